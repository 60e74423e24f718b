"""Messages that can't be parsed are the caller's fault: what their handlers raise says so."""

import inspect
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Any

from google.protobuf.message import DecodeError

from unroll_engine.errors import InvalidRequestError

REASON = "MALFORMED_MESSAGE"
_Behavior = Callable[[Any, Any], Any]


def tolerant(handler: Any) -> Any:
    """The handler, raising InvalidRequestError for a message that can't be parsed.

    One with many requests raises it where it asks for the next. One with a single request is never asked: its message
    is parsed before anything could be caught (grpcio answers UNKNOWN then), so that the error takes its place.

    Args:
        handler: A grpc.RpcMethodHandler; returned as it is where it takes bytes.
    """
    parse = handler.request_deserializer
    if parse is None:
        return handler
    if handler.request_streaming:
        return handler._replace(request_deserializer=_raising(parse))
    kind = "unary_stream" if handler.response_streaming else "unary_unary"
    behavior = _checked(getattr(handler, kind))
    return handler._replace(request_deserializer=_returning(parse), **{kind: behavior})


def _error() -> InvalidRequestError:
    error = InvalidRequestError("the message can't be parsed as the one that this method takes")
    error.reason = REASON
    return error


def _raising(parse: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    def deserialize(data: bytes) -> Any:
        try:
            return parse(data)
        except DecodeError:
            raise _error() from None

    return deserialize


def _returning(parse: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    def deserialize(data: bytes) -> Any:
        try:
            return parse(data)
        except DecodeError:
            return _error()

    return deserialize


def _checked(behavior: _Behavior) -> _Behavior:
    """Wraps a behavior, in one of the same kind, to raise its request if that is an error."""

    async def coroutine(request: Any, context: Any) -> Any:
        if type(request) is InvalidRequestError:
            raise request
        return await behavior(request, context)

    async def generator(request: Any, context: Any) -> AsyncIterator[Any]:
        if type(request) is InvalidRequestError:
            raise request
        async with aclosing(behavior(request, context)) as responses:
            async for response in responses:
                yield response

    def function(request: Any, context: Any) -> Any:
        if type(request) is InvalidRequestError:
            raise request
        return behavior(request, context)

    if inspect.iscoroutinefunction(behavior):
        return coroutine
    return generator if inspect.isasyncgenfunction(behavior) else function
