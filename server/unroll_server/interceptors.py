"""What stands before every handler: the one table from domain errors to statuses, and the end of endless calls."""

import asyncio
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
    InternalError,
    InvalidRequestError,
    ModelNotFoundError,
    OverloadedError,
    RequestError,
    SequenceStateError,
)

_log = logging.getLogger(__name__)

STATUS = {
    InvalidRequestError: grpc.StatusCode.INVALID_ARGUMENT,
    ModelNotFoundError: grpc.StatusCode.NOT_FOUND,
    SequenceStateError: grpc.StatusCode.FAILED_PRECONDITION,
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
        if handler.unary_stream:
            return handler._replace(unary_stream=self._bounded_writer(handler.unary_stream))
        if handler.stream_stream:
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

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """See grpc.aio.ServerInterceptor."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        method = handler_call_details.method
        if handler.unary_unary:
            return handler._replace(unary_unary=_coroutine(handler.unary_unary, method))
        if handler.unary_stream:
            # Only health's Watch, which writes to its context instead of yielding.
            return handler._replace(unary_stream=_coroutine(handler.unary_stream, method))
        if handler.stream_stream:
            return handler._replace(stream_stream=_stream(handler.stream_stream, method))
        return handler


def _coroutine(behavior: Callable[[Any, Any], Awaitable[Any]], method: str) -> Callable[[Any, Any], Awaitable[Any]]:
    async def call(request: Any, context: Any) -> Any:
        try:
            return await behavior(request, context)
        except Exception as error:
            await _abort(error, context, method)

    return call


def _stream(
    behavior: Callable[[Any, Any], AsyncGenerator[Any, None]], method: str
) -> Callable[[Any, Any], AsyncIterator[Any]]:
    async def call(requests: Any, context: Any) -> AsyncIterator[Any]:
        try:
            async with aclosing(behavior(requests, context)) as responses:
                async for response in responses:
                    yield response
        except Exception as error:
            await _abort(error, context, method)

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
