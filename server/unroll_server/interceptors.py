"""What stands before every handler: the one table from domain errors to statuses, and the log of what failed."""

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing, contextmanager
from typing import Any

import grpc
import grpc.aio
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

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

PUSHBACK = "grpc-retry-pushback-ms"


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


class CallsInFlight(grpc.aio.ServerInterceptor):
    """Counts the calls of one service that have begun and not ended.

    Args:
        service: Its full name.
    """

    def __init__(self, service: str) -> None:
        self.count = 0
        self._prefix = f"/{service}/"
        self._changed = asyncio.Event()

    async def idle(self) -> None:
        """Waits until no call is in flight."""
        while self.count:
            self._changed.clear()
            await self._changed.wait()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """See grpc.aio.ServerInterceptor."""
        handler = await continuation(handler_call_details)
        if handler is None or not handler_call_details.method.startswith(self._prefix):
            return handler
        if handler.unary_unary:
            return handler._replace(unary_unary=self._counted_unary(handler.unary_unary))
        return handler._replace(stream_stream=self._counted_stream(handler.stream_stream))

    def _counted_unary(self, behavior: Callable[[Any, Any], Awaitable[Any]]) -> Callable[[Any, Any], Awaitable[Any]]:
        async def call(request: Any, context: Any) -> Any:
            with self._counted():
                return await behavior(request, context)

        return call

    def _counted_stream(
        self, behavior: Callable[[Any, Any], AsyncGenerator[Any, None]]
    ) -> Callable[[Any, Any], AsyncIterator[Any]]:
        async def call(requests: Any, context: Any) -> AsyncIterator[Any]:
            with self._counted():
                async with aclosing(behavior(requests, context)) as responses:
                    async for response in responses:
                        yield response

        return call

    @contextmanager
    def _counted(self) -> Iterator[None]:
        self.count += 1
        try:
            yield
        finally:
            self.count -= 1
            self._changed.set()


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
            return handler._replace(unary_unary=_unary(handler.unary_unary, method))
        if handler.stream_stream:
            return handler._replace(stream_stream=_stream(handler.stream_stream, method))
        return handler


def _unary(behavior: Callable[[Any, Any], Awaitable[Any]], method: str) -> Callable[[Any, Any], Awaitable[Any]]:
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
    if isinstance(error, OverloadedError):
        context.set_trailing_metadata(((PUSHBACK, str(int(error.retry_after * 1000))),))
    await context.abort_with_status(rpc_status.to_status(status_of(error)))
