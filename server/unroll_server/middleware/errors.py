"""What stands before every handler: the one table from domain errors to statuses."""

import asyncio
import inspect
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing
from functools import lru_cache
from typing import Any

import grpc
import grpc.aio

from unroll_engine.errors import (
    InternalError,
    OverloadedError,
    RequestError,
)
from unroll_server import caller
from unroll_server.middleware.access_log import REQUEST_ID, Calls, Method, cancelled_code, code_of
from unroll_server.status import DETAILS, PUSHBACK, STATUS, status_of
from unroll_server.telemetry.metrics import Metrics

_log = logging.getLogger(__name__)

_Behavior = Callable[[Any, Any], Any]
_OnError = Callable[[Exception, Any], Awaitable[None]]
_UNKNOWN: int = grpc.StatusCode.UNKNOWN.value[0]


class StatusInterceptor(grpc.aio.ServerInterceptor):
    """Ends a call whose handler raised a domain error with that error's status, any other with INTERNAL.

    Args:
        calls: Hears of every call, those of methods that there are not included.
    """

    per_method = True
    """True: the result depends on the method alone, so that `Registry` asks once a method."""

    def __init__(self, calls: Calls | None = None) -> None:
        self._calls = calls or Calls(Metrics())

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """See grpc.aio.ServerInterceptor."""
        handler = await continuation(handler_call_details)
        if handler is None:
            self._calls.unknown(handler_call_details.method)
            return None
        method = self._calls.method(handler_call_details.method, handler)
        if handler.request_deserializer:
            handler = handler._replace(request_deserializer=method.reading(handler.request_deserializer))
        if handler.response_serializer:
            handler = handler._replace(response_serializer=method.writing(handler.response_serializer))
        for kind in ("unary_unary", "unary_stream", "stream_unary", "stream_stream"):
            behavior = getattr(handler, kind)
            if inspect.iscoroutinefunction(behavior):
                return handler._replace(**{kind: _guarded(behavior, _coroutine, method)})
            if inspect.isasyncgenfunction(behavior):
                return handler._replace(**{kind: _guarded(behavior, _generator, method)})
            if behavior:
                # Handlers that run in a thread are not ours: grpc.aio ends them, and they are only counted.
                count = _threaded_many if handler.response_streaming else _threaded
                return handler._replace(**{kind: count(behavior, method)})
        return handler


def _guarded(
    behavior: _Behavior, wrap: Callable[[_Behavior, _OnError, Method], _Behavior], method: Method
) -> _Behavior:
    """Wraps a behavior so that its errors become statuses, and its calls are counted."""

    async def on_error(error: Exception, context: Any) -> None:
        await _abort(error, context, method.path)

    return wrap(behavior, on_error, method)


def _coroutine(behavior: _Behavior, on_error: _OnError, method: Method) -> _Behavior:
    async def call(request: Any, context: Any) -> Any:
        opened = method.open(context)
        response = None
        try:
            try:
                response = await behavior(request, context)
            except Exception as error:
                await on_error(error, context)
        except BaseException as error:
            code = cancelled_code(context) if isinstance(error, asyncio.CancelledError) else code_of(context)
            opened.note(request, response)
            opened.end(code or _UNKNOWN)
            raise
        opened.note(request, response)
        opened.end(code_of(context))
        return response

    return call


def _generator(behavior: _Behavior, on_error: _OnError, method: Method) -> _Behavior:
    async def call(request: Any, context: Any) -> AsyncIterator[Any]:
        opened = method.open(context)
        try:
            try:
                async with aclosing(behavior(request, context)) as responses:
                    async for response in responses:
                        yield response
            except Exception as error:
                await on_error(error, context)
        except (asyncio.CancelledError, GeneratorExit):
            opened.end(cancelled_code(context))
            raise
        except BaseException:
            opened.end(code_of(context) or _UNKNOWN)
            raise
        opened.end(code_of(context))

    return call


def _threaded(behavior: _Behavior, method: Method) -> _Behavior:
    def call(request: Any, context: Any) -> Any:
        opened = method.open_in_thread(context)
        try:
            response = behavior(request, context)
        except BaseException:
            opened.end(code_of(context) or _UNKNOWN)
            raise
        opened.end(code_of(context))
        return response

    return call


def _threaded_many(behavior: _Behavior, method: Method) -> _Behavior:
    def call(request: Any, context: Any) -> Iterator[Any]:
        opened = method.open_in_thread(context)
        try:
            yield from behavior(request, context)
        except GeneratorExit:
            opened.end(grpc.StatusCode.CANCELLED.value[0])
            raise
        except BaseException:
            opened.end(code_of(context) or _UNKNOWN)
            raise
        opened.end(code_of(context))

    return call


async def _abort(error: Exception, context: Any, method: str) -> None:
    if isinstance(error, (grpc.aio.AbortError, asyncio.CancelledError)):
        raise error
    if not isinstance(error, RequestError):
        _log.error("%s failed", method, exc_info=error)
        error = InternalError("the server failed; its log has the cause")
    trailers: list[tuple[str, str | bytes]]
    if isinstance(error, OverloadedError):
        trailers = list(_refusal(error.description, error.retry_after, error.reason))
    else:
        trailers = [(DETAILS, status_of(error).SerializeToString())]
    if name := caller.request_id.get():
        trailers.append((REQUEST_ID, name))
    await context.abort(STATUS[type(error)], str(error), tuple(trailers))


@lru_cache(1024)
def _refusal(description: str, retry_after: float, reason: str) -> tuple[tuple[str, str | bytes], ...]:
    """The trailers of a refusal. There are many like it when there are any, and they must cost little."""
    status = status_of(OverloadedError(description, retry_after, reason))
    return (DETAILS, status.SerializeToString()), (PUSHBACK, str(round(retry_after * 1000)))
