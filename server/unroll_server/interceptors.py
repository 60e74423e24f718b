"""What stands before every handler: the one table from domain errors to statuses, and the end of endless calls."""

import asyncio
import inspect
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from typing import Any

import grpc
import grpc.aio
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from unroll_server.errors import (
    DrainingError,
    ExpiredError,
    InternalError,
    InvalidRequestError,
    ModelNotFoundError,
    OverloadedError,
    RequestError,
    SequenceStateError,
)

_log = logging.getLogger(__name__)

_Behavior = Callable[[Any, Any], Any]
_OnError = Callable[[Exception, Any], Awaitable[None]]

STATUS = {
    InvalidRequestError: grpc.StatusCode.INVALID_ARGUMENT,
    ModelNotFoundError: grpc.StatusCode.NOT_FOUND,
    SequenceStateError: grpc.StatusCode.FAILED_PRECONDITION,
    ExpiredError: grpc.StatusCode.DEADLINE_EXCEEDED,
    OverloadedError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    DrainingError: grpc.StatusCode.UNAVAILABLE,
    InternalError: grpc.StatusCode.INTERNAL,
}
"""The status of each domain error; docs/api.md explains them."""

DETAILS = "grpc-status-details-bin"
"""The trailer that carries the google.rpc.Status of a call."""
PUSHBACK = "grpc-retry-pushback-ms"
"""The trailer that tells a retrying client when to come again."""


def status_of(error: RequestError) -> status_pb2.Status:
    """The status of an error, with the field at fault (BadRequest) and when to try again (RetryInfo) as details."""
    details: list[Message] = []
    if error.field:
        violation = error_details_pb2.BadRequest.FieldViolation(field=error.field, description=error.description)
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    if isinstance(error, OverloadedError):
        delay = Duration()
        delay.FromNanoseconds(int(error.retry_after * 1e9))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    status = status_pb2.Status(code=STATUS[type(error)].value[0], message=str(error))
    for detail in details:
        status.details.add().Pack(detail)
    return status


class EndlessCalls(grpc.aio.ServerInterceptor):
    """Ends, when the server drains, the streams that never end by themselves: health watchers, reflection.

    Without it a drain would wait for them as long as it may.

    Args:
        service: Full name of the service whose calls do end; they are left alone.
    """

    per_method = True
    """What it makes of a handler depends on the method alone, so that a front can ask once."""

    def __init__(self, service: str) -> None:
        self._prefix = f"/{service}/"
        self._open: set[asyncio.Timeout] = set()

    def end(self, seconds: float) -> None:
        """Lets the calls of now go on for so long, for a last word, and no longer."""
        for timeout in self._open:
            timeout.reschedule(asyncio.get_running_loop().time() + seconds)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """See grpc.aio.ServerInterceptor."""
        handler = await continuation(handler_call_details)
        if handler is None or handler_call_details.method.startswith(self._prefix):
            return handler
        if inspect.iscoroutinefunction(handler.unary_stream):
            return handler._replace(unary_stream=self._bounded_writer(handler.unary_stream))
        if inspect.isasyncgenfunction(handler.stream_stream):
            return handler._replace(stream_stream=self._bounded_generator(handler.stream_stream))
        return handler

    def _bounded_writer(self, behavior: Callable[[Any, Any], Awaitable[None]]) -> Callable[[Any, Any], Awaitable[None]]:
        async def call(request: Any, context: Any) -> None:
            async with self._bounded():
                await behavior(request, context)

        return call

    def _bounded_generator(
        self, behavior: Callable[[Any, Any], AsyncGenerator[Any, None]]
    ) -> Callable[[Any, Any], AsyncIterator[Any]]:
        async def call(requests: Any, context: Any) -> AsyncIterator[Any]:
            async with self._bounded(), aclosing(behavior(requests, context)) as responses:
                async for response in responses:
                    yield response

        return call

    @asynccontextmanager
    async def _bounded(self) -> AsyncIterator[None]:
        timeout = asyncio.timeout(None)
        self._open.add(timeout)
        try:
            async with timeout:
                yield
        except TimeoutError:
            raise DrainingError("the server is shutting down") from None
        finally:
            self._open.remove(timeout)


class StatusInterceptor(grpc.aio.ServerInterceptor):
    """Ends a call whose handler raised a domain error with that error's status, any other with INTERNAL."""

    per_method = True
    """What it makes of a handler depends on the method alone, so that a front can ask once."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """See grpc.aio.ServerInterceptor."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        for kind in ("unary_unary", "unary_stream", "stream_unary", "stream_stream"):
            behavior = getattr(handler, kind)
            if inspect.iscoroutinefunction(behavior):
                return handler._replace(**{kind: _guarded(behavior, _coroutine, handler_call_details.method)})
            if inspect.isasyncgenfunction(behavior):
                return handler._replace(**{kind: _guarded(behavior, _generator, handler_call_details.method)})
        # What runs in a thread is none of ours; the fronts end it as grpc.aio does.
        return handler


def _guarded(behavior: _Behavior, wrap: Callable[[_Behavior, _OnError], _Behavior], method: str) -> _Behavior:
    """The behavior with its errors made statuses; a front that does that itself finds what it needs on it."""

    async def on_error(error: Exception, context: Any) -> None:
        await _abort(error, context, method)

    wrapped = wrap(behavior, on_error)
    wrapped.inner, wrapped.on_error = behavior, on_error  # type: ignore[attr-defined]  # functions take attributes
    return wrapped


def _coroutine(behavior: _Behavior, on_error: _OnError) -> _Behavior:
    async def call(request: Any, context: Any) -> Any:
        try:
            return await behavior(request, context)
        except Exception as error:
            await on_error(error, context)

    return call


def _generator(behavior: _Behavior, on_error: _OnError) -> _Behavior:
    async def call(request: Any, context: Any) -> AsyncIterator[Any]:
        try:
            async with aclosing(behavior(request, context)) as responses:
                async for response in responses:
                    yield response
        except Exception as error:
            await on_error(error, context)

    return call


async def _abort(error: Exception, context: Any, method: str) -> None:
    if isinstance(error, (grpc.aio.AbortError, asyncio.CancelledError)):
        raise error
    if not isinstance(error, RequestError):
        _log.error("%s failed", method, exc_info=error)
        error = InternalError("the server failed; its log has the cause")
    status = status_of(error)
    trailers: list[tuple[str, str | bytes]] = [(DETAILS, status.SerializeToString())]
    if isinstance(error, OverloadedError):
        trailers.append((PUSHBACK, str(int(error.retry_after * 1000))))
    await context.abort(STATUS[type(error)], status.message, tuple(trailers))
