"""Who calls, by bearer token or client certificate, how many calls of theirs there may be, and whether they may at all.

Credentials are looked at before a handler sees the call. Nothing here logs one.
"""

import asyncio
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing, contextmanager
from typing import Any

import grpc
import grpc.aio

from unroll_engine.errors import RequestError
from unroll_server import caller
from unroll_server.errors import ForbiddenError, UnauthenticatedError
from unroll_server.identity.quotas import CALLS, Usage
from unroll_server.identity.tokens import Identities, Identity, digest_of

POLL = 1.0
"""Seconds between looks whether the file of identities has changed."""
OPEN = (
    "/grpc.health.v1.Health/",
    "/inference.GRPCInferenceService/ServerLive",
    "/inference.GRPCInferenceService/ServerReady",
)
"""What is answered without credentials: whether the server lives."""
_SUBJECTS = ("x509_subject_alternative_name", "x509_common_name")
_UNKNOWN = "the bearer token is not known"
_MISSING = "a bearer token is needed, as metadata authorization: Bearer TOKEN"


class AuthInterceptor(grpc.aio.ServerInterceptor):
    """Tells each call's handler who calls (`caller.identity`), and refuses those who may not.

    A stream whose token is withdrawn while it is open ends within `POLL` seconds.

    Args:
        identities: Who is known.
        usage: Counts their calls in flight.
        admins_only: Whether only identities with `admin = true` may call, where there are tokens.

    Raises, in the handler's place:
        UnauthenticatedError: no credentials, or unknown ones.
        ForbiddenError: known ones that do not suffice.
        OverloadedError: the identity has as many calls in flight as it may.
    """

    per_method = True
    """True: the result depends on the method alone, so that `Registry` asks once a method."""

    def __init__(self, identities: Identities, usage: Usage, admins_only: bool = False) -> None:
        self._identities = identities
        self._usage = usage
        self._admins_only = admins_only
        self._streams: dict[asyncio.Timeout, tuple[bytes, Identity]] = {}

    async def watch(self) -> None:
        """Reads the file again whenever it changes, until cancelled."""
        seen = self._identities.version
        while True:
            await asyncio.sleep(POLL)
            await asyncio.to_thread(self._identities.reload)
            # Another listener may have read it first.
            if seen != self._identities.version:
                seen = self._identities.version
                self.withdraw()

    def withdraw(self) -> None:
        """Ends the streams whose credentials are not good any more."""
        now = asyncio.get_running_loop().time()
        for timeout, (digest, identity) in self._streams.items():
            if timeout.expired():
                continue  # it ends already
            known = self._identities.of_token(digest) if digest else self._identities.named(identity.name)
            if known is None or known.name != identity.name or (self._admins_only and not known.admin):
                timeout.reschedule(now)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """See grpc.aio.ServerInterceptor."""
        handler = await continuation(handler_call_details)
        if handler is None or handler_call_details.method.startswith(OPEN):
            return handler
        for kind, wrap in (
            ("unary_unary", self._around_coroutine),
            ("unary_stream", self._around_writer),
            ("stream_unary", self._around_writer),
            ("stream_stream", self._around_writer),
        ):
            behavior = getattr(handler, kind)
            if behavior is None:
                continue
            if inspect.isasyncgenfunction(behavior):
                wrap = self._around_generator
            elif not inspect.iscoroutinefunction(behavior):
                wrap = self._around_thread
            return handler._replace(**{kind: wrap(behavior)})
        return handler

    def _around_coroutine(self, behavior: Callable[[Any, Any], Awaitable[Any]]) -> Callable[[Any, Any], Any]:
        async def call(request: Any, context: Any) -> Any:
            with self._counted(self._identified(context)[1]):
                return await behavior(request, context)

        return call

    def _around_writer(self, behavior: Callable[[Any, Any], Awaitable[Any]]) -> Callable[[Any, Any], Any]:
        async def call(request: Any, context: Any) -> Any:
            digest, identity = self._identified(context)
            with self._counted(identity), self._watched(digest, identity) as timeout:
                try:
                    async with timeout:
                        return await behavior(request, context)
                except TimeoutError:
                    raise _withdrawn(timeout) from None

        return call

    def _around_generator(self, behavior: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
        async def call(request: Any, context: Any) -> AsyncIterator[Any]:
            digest, identity = self._identified(context)
            with self._counted(identity), self._watched(digest, identity) as timeout:
                try:
                    async with timeout, aclosing(behavior(request, context)) as responses:
                        async for response in responses:
                            yield response
                except TimeoutError:
                    raise _withdrawn(timeout) from None

        return call

    def _around_thread(self, behavior: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
        # The handlers that run in a thread are not ours, and short; they have no part in what is counted on the loop.
        def call(request: Any, context: Any) -> Any:
            try:
                self._identified(context)
            except ForbiddenError as error:
                context.abort(grpc.StatusCode.PERMISSION_DENIED, str(error))
            except RequestError as error:
                context.abort(grpc.StatusCode.UNAUTHENTICATED, str(error))
            return behavior(request, context)

        return call

    def _identified(self, context: Any) -> tuple[bytes, Identity]:
        """The hash of the caller's token, empty where there is none, and who the caller is."""
        digest, identity = self._look(context)
        if self._admins_only and self._identities.have_tokens and not identity.admin:
            raise ForbiddenError("this identity may not administer the server")
        caller.identity.set(identity.name)
        return digest, identity

    def _look(self, context: Any) -> tuple[bytes, Identity]:
        if self._identities.have_tokens:
            values = [value for key, value in context.invocation_metadata() or () if key == "authorization"]
            if len(values) > 1:
                raise UnauthenticatedError("more than one authorization")
            if values:
                scheme, _, token = str(values[0]).strip().partition(" ")
                if scheme.lower() != "bearer":
                    raise UnauthenticatedError(_MISSING)
                digest = digest_of(token.strip())
                identity = self._identities.of_token(digest)
                if identity is None:
                    raise UnauthenticatedError(_UNKNOWN)
                return digest, identity
        name = certificate_identity(context)
        if not name and self._identities.have_tokens:
            raise UnauthenticatedError(_MISSING)
        return b"", self._identities.named(name)

    @contextmanager
    def _counted(self, identity: Identity) -> Iterator[None]:
        self._usage.take(CALLS, identity.name)
        try:
            yield
        finally:
            self._usage.give(CALLS, identity.name)

    @contextmanager
    def _watched(self, digest: bytes, identity: Identity) -> Iterator[asyncio.Timeout]:
        timeout = asyncio.timeout(None)
        self._streams[timeout] = (digest, identity)
        try:
            yield timeout
        finally:
            del self._streams[timeout]


def _withdrawn(timeout: asyncio.Timeout) -> Exception:
    # A TimeoutError can be the handler's own, too.
    return (
        UnauthenticatedError("the credentials of this stream were withdrawn") if timeout.expired() else TimeoutError()
    )


def certificate_identity(context: Any) -> str:
    """The name in the certificate that the caller proved to hold: its first subject alternative name, or common name.

    Empty where there is none. Certificates that were not verified against `--tls-client-ca` do not come this far.
    """
    found = context.auth_context() or {}
    for subject in _SUBJECTS:
        for value in found.get(subject, ()):
            return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
    return ""
