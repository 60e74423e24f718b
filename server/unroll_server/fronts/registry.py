"""The handlers that servicers registered, each with what the interceptors make of it."""

from collections.abc import Awaitable, Callable, Coroutine, Sequence
from itertools import takewhile
from typing import Any

import grpc
import grpc.aio

Continuation = Callable[[grpc.HandlerCallDetails], Awaitable[Any]]


class Registry(grpc.GenericRpcHandler):
    """What the generated `add_...Servicer_to_server` functions take.

    An interceptor with a true attribute `per_method` promises that what it makes of a handler depends on the method
    alone, and that it waits for nothing. The innermost of them are asked here, once a method.

    Args:
        interceptors: What stands before every handler, outermost first.

    Attributes:
        each_call: The interceptors that are to be asked for each call, outermost first: all outside of those.
    """

    def __init__(self, interceptors: Sequence[grpc.aio.ServerInterceptor]) -> None:
        innermost_first = reversed(interceptors)
        self._once = tuple(takewhile(lambda interceptor: getattr(interceptor, "per_method", False), innermost_first))
        self.each_call = tuple(interceptors[: len(interceptors) - len(self._once)])
        self._registered: dict[str, Any] = {}
        self._generic: list[grpc.GenericRpcHandler] = []
        self._intercepted: dict[str, Any] = {}

    def add_registered_method_handlers(self, service: str, handlers: dict[str, Any]) -> None:
        """See grpc.aio.Server."""
        for name, handler in handlers.items():
            self._registered[f"/{service}/{name}"] = handler

    def add_generic_rpc_handlers(self, handlers: Sequence[grpc.GenericRpcHandler]) -> None:
        """See grpc.aio.Server."""
        self._generic.extend(handlers)

    def is_registered(self, path: str) -> bool:
        """Whether the handler of `/package.Service/Method` is the same for each call."""
        return path in self._registered

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        """The handler of a call, None where there is none; see grpc.GenericRpcHandler."""
        path = handler_call_details.method
        if handler := self._intercepted.get(path):
            return handler
        handler = self._registered.get(path)
        if handler is None:
            found = (generic.service(handler_call_details) for generic in self._generic)
            handler = next((handler for handler in found if handler is not None), None)
        for interceptor in self._once:
            handler = _at_once(interceptor.intercept_service(_giving(handler), handler_call_details))
        if path in self._registered:
            self._intercepted[path] = handler
        return handler


def _giving(handler: Any) -> Continuation:
    async def continuation(handler_call_details: grpc.HandlerCallDetails) -> Any:
        return handler

    return continuation


def _at_once(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """The result of a coroutine that waits for nothing."""
    try:
        coroutine.send(None)
    except StopIteration as done:
        return done.value
    coroutine.close()
    raise RuntimeError("an interceptor with per_method waits for something")
