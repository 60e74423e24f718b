"""Authentication by bearer token or client certificate, before the handler runs. Credentials are never logged."""

import asyncio
from collections.abc import Awaitable
from typing import Any

from unroll_server import caller
from unroll_server.errors import ForbiddenError, UnauthenticatedError
from unroll_server.identity.quotas import Quotas
from unroll_server.identity.tokens import Identities, Identity, digest_of
from unroll_server.middleware import Behavior, CallContext, Method

POLL = 1.0
"""Seconds between checks of the file of identities."""
OPEN = (
    "/grpc.health.v1.Health/",
    "/inference.GRPCInferenceService/ServerLive",
    "/inference.GRPCInferenceService/ServerReady",
)
"""Prefixes of methods that need no credentials: probes of the server."""
_SUBJECTS = ("x509_subject_alternative_name", "x509_common_name")
_UNKNOWN = "the bearer token is not known"
_MISSING = "a bearer token is needed, as metadata authorization: Bearer TOKEN"


class AuthMiddleware:
    """Identifies the caller of each call (`Call.identity`), refuses unknown ones, and counts calls by identity.

    A stream whose credentials are withdrawn while it is open ends within `POLL` seconds.

    Args:
        identities: The known identities.
        quotas: Counts and bounds their calls in flight.
        admins_only: True to admit only identities with `admin = true`, if there are tokens.

    The calls raise:
        UnauthenticatedError: the credentials are missing or unknown.
        ForbiddenError: the identity is known but lacks the right.
        OverloadedError: the identity's quota of calls in flight is used up.
    """

    def __init__(self, identities: Identities, quotas: Quotas, admins_only: bool = False) -> None:
        self._identities = identities
        self._quotas = quotas
        self._admins_only = admins_only
        self._streams: dict[asyncio.Timeout, tuple[bytes, Identity]] = {}

    async def watch(self) -> None:
        """Reloads the file whenever it changes, until cancelled."""
        seen = self._identities.version
        while True:
            await asyncio.sleep(POLL)
            await asyncio.to_thread(self._identities.reload)
            # Another listener may have reloaded it first.
            if seen != self._identities.version:
                seen = self._identities.version
                self.withdraw()

    def withdraw(self) -> None:
        """Ends the streams whose credentials are no longer valid."""
        now = asyncio.get_running_loop().time()
        for timeout, (digest, identity) in self._streams.items():
            if timeout.expired():
                continue  # it is ending already
            known = self._identities.of_token(digest) if digest else self._identities.named(identity.name)
            if known is None or known.name != identity.name or (self._admins_only and not known.admin):
                timeout.reschedule(now)

    def wrap(self, method: Method) -> Behavior:
        """See Middleware."""
        behavior = method.behavior
        if method.path.startswith(OPEN):
            return behavior

        async def call(request: Any, context: CallContext) -> Any:
            digest, identity = self._identify(context)
            if self._admins_only and self._identities.have_tokens and not identity.admin:
                raise ForbiddenError("this identity may not administer the server")
            caller.current.get().identity = identity.name
            self._quotas.open_call(identity.name)
            try:
                if not method.response_streaming:
                    return await behavior(request, context)
                await self._until_withdrawn(behavior(request, context), digest, identity)
            finally:
                self._quotas.close_call(identity.name)

        return call

    async def _until_withdrawn(self, stream: Awaitable[None], digest: bytes, identity: Identity) -> None:
        timeout = asyncio.timeout(None)
        self._streams[timeout] = (digest, identity)
        try:
            async with timeout:
                await stream
        except TimeoutError:
            # The handler itself may raise TimeoutError.
            if not timeout.expired():
                raise
            raise UnauthenticatedError("the credentials of this stream were withdrawn") from None
        finally:
            del self._streams[timeout]

    def _identify(self, context: CallContext) -> tuple[bytes, Identity]:
        """Returns the hash of the caller's token, empty without a token, and the caller's identity."""
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


def certificate_identity(context: CallContext) -> str:
    """Returns the name in the caller's verified certificate: the first subject alternative name, or the common name.

    Empty without a certificate. The transport rejects certificates that `--tls-client-ca` did not sign.
    """
    found = context.auth_context()
    for subject in _SUBJECTS:
        for value in found.get(subject, ()):
            return value.decode("utf-8", "replace")
    return ""
