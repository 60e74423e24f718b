"""The methods that servicers registered, as the ASGI front calls them."""

import inspect
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import grpc
import grpc.aio

from unroll_server import calls
from unroll_server.fronts.gate import Gate
from unroll_server.fronts.grpc_wire import Metadata
from unroll_server.fronts.registry import Continuation, Entrance, Registry


class CallDetails(grpc.HandlerCallDetails):
    """What an interceptor is told of a call.

    Attributes:
        method: `/package.Service/Method`.
        invocation_metadata: The caller's metadata.
    """

    def __init__(self, method: str, invocation_metadata: Metadata) -> None:
        self.method = method
        self.invocation_metadata = tuple(invocation_metadata)


class Method:
    """A method as it is called.

    A behavior that stands before another only for its exceptions, and to hear of its calls, can say so: it has that one
    as its attribute `inner`, `on_error(error, context)`, None for nothing, and `method`. It is then left out, which
    spares every message a coroutine.

    Attributes:
        path: `/package.Service/Method`.
        behavior: What answers: `(request or requests, context)`.
        deserialize: Bytes of a request to the request.
        serialize: A response to its bytes.
        many_requests: Whether it takes a stream of requests.
        many_responses: Whether it gives a stream of responses.
        is_async: Whether the behavior is a coroutine or an async generator function; any other runs in a thread.
        yields: Whether the behavior is a generator of the responses; one that is not writes them to its context.
        on_error: What is done about an exception of the behavior; None for nothing.
        calls: Who hears of its calls; None for nobody.
        unread: The same method where its message is read only if the call is not refused; None for none.
    """

    def __init__(self, path: str, handler: Any, unread: "Method | None" = None) -> None:
        self.path = path
        self.unread = unread
        self.many_requests: bool = handler.request_streaming
        self.many_responses: bool = handler.response_streaming
        self.behavior: Callable[[Any, Any], Any] = (
            handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream
        )
        self.deserialize: Callable[[bytes], Any] = handler.request_deserializer or bytes
        self.serialize: Callable[[Any], bytes] = handler.response_serializer or bytes
        self.on_error: Callable[[Exception, Any], Awaitable[None]] | None = getattr(self.behavior, "on_error", None)
        self.calls: calls.Method | None = getattr(self.behavior, "method", None)
        self.behavior = getattr(self.behavior, "inner", self.behavior)
        self.yields = inspect.isasyncgenfunction(self.behavior)
        self.is_async = self.yields or inspect.iscoroutinefunction(self.behavior)


class Methods(Registry):
    """The registry of the ASGI front.

    Args:
        interceptors: See `Registry`.
        gate: What refuses guarded calls before they come here; None for nothing.

    Attributes:
        resolved: The methods that need no asking again, by path.
    """

    def __init__(self, interceptors: Sequence[grpc.aio.ServerInterceptor], gate: Gate | None = None) -> None:
        super().__init__(interceptors)
        self._gate = gate
        self.resolved: dict[str, Method] = {}

    def guard(self, entrance: Entrance, paths: Mapping[str, bool]) -> None:
        """See Registry."""
        super().guard(entrance, paths)
        if self._gate:
            self._gate.open(entrance, paths)

    async def find(self, path: str, metadata: Metadata) -> Method | None:
        """The method of a call, None where there is none.

        Args:
            path: `/package.Service/Method`.
            metadata: The call's.
        """
        details = CallDetails(path, metadata)
        handler = await self._ask(0, details)
        if handler is None:
            return None
        # Interceptors that look at each call would have to look at it twice.
        unread = None if self.each_call else self.unread(details)
        method = Method(path, handler, Method(path, unread) if unread else None)
        if not self.each_call and self.is_registered(path):
            self.resolved[path] = method
        return method

    async def _ask(self, position: int, details: grpc.HandlerCallDetails) -> Any:
        if position == len(self.each_call):
            return self.service(details, guarded=False)
        further: Continuation = lambda changed: self._ask(position + 1, changed)  # noqa: E731
        return await self.each_call[position].intercept_service(further, details)
