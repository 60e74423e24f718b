"""The handlers that servicers registered, each with what the interceptors make of it."""

import asyncio
from collections.abc import Awaitable, Callable, Container, Coroutine, Mapping, Sequence
from functools import partial
from itertools import takewhile
from typing import Any, NamedTuple

import grpc
import grpc.aio

from unroll_engine.admission import AdmissionController
from unroll_engine.errors import InvalidRequestError
from unroll_server.caller import identity
from unroll_server.errors import DrainingError
from unroll_server.middleware.access_log import REQUEST_ID, take_request_id
from unroll_server.transport.parsing import tolerant

Continuation = Callable[[grpc.HandlerCallDetails], Awaitable[Any]]


class _Guard(NamedTuple):
    admission: AdmissionController
    paths: Mapping[str, bool]
    probes: Container[str]


class Registry(grpc.GenericRpcHandler):
    """What the generated `add_...Servicer_to_server` functions take.

    An interceptor with a true attribute `per_method` promises that what it makes of a handler depends on the method
    alone, and that it waits for nothing. The innermost of them are asked here, once a method.

    Args:
        interceptors: What stands before every handler, outermost first.

    Attributes:
        each_call: The interceptors that are to be asked for each call, outermost first: all outside of those.
        in_flight: Tasks of the calls that have arrived and whose answers have not been sent.
        turned_away: Calls refused since `turn_away`.
    """

    def __init__(self, interceptors: Sequence[grpc.aio.ServerInterceptor]) -> None:
        innermost_first = reversed(interceptors)
        self._once = tuple(takewhile(lambda interceptor: getattr(interceptor, "per_method", False), innermost_first))
        self.each_call = tuple(interceptors[: len(interceptors) - len(self._once)])
        self._registered: dict[str, Any] = {}
        self._generic: list[grpc.GenericRpcHandler] = []
        self._intercepted: dict[str, Any] = {}
        self._guard: _Guard | None = None
        self._unread: dict[str, Any] = {}
        self._draining = False
        self.in_flight: set[asyncio.Task[Any]] = set()
        self.turned_away = 0

    def guard(self, admission: AdmissionController, paths: Mapping[str, bool], probes: Container[str]) -> None:
        """Refuses calls before their message is read, while the server is strained or drains.

        Methods are named as `/package.Service/Method`.

        Args:
            admission: Refuses calls of a strained server.
            paths: Unary methods that bring work; of each, whether its work goes before bulk work.
            probes: Unary methods that a draining server still answers.
        """
        self._guard = _Guard(admission, paths, probes)

    def turn_away(self) -> bool:
        """Refuses unary calls from now on, probes excepted; returns False if there is no guard, which refuses none."""
        self._draining = self._guard is not None
        return self._draining

    def add_registered_method_handlers(self, service: str, handlers: dict[str, Any]) -> None:
        """See grpc.aio.Server."""
        for name, handler in handlers.items():
            self._registered[f"/{service}/{name}"] = handler

    def add_generic_rpc_handlers(self, handlers: Sequence[grpc.GenericRpcHandler]) -> None:
        """See grpc.aio.Server."""
        self._generic.extend(handlers)

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        """The handler of a call, None if there is none; see grpc.GenericRpcHandler."""
        path = handler_call_details.method
        # This runs in the task of the call, where it is asked for each one, and the metadata are at hand.
        if call := asyncio.current_task():
            self.in_flight.add(call)
            call.add_done_callback(self.in_flight.discard)
        for key, value in handler_call_details.invocation_metadata or ():
            if key == REQUEST_ID:
                take_request_id(value)
        if self._guard and self._is_checked_unread(self._guard, path):
            return self._unread_handler(self._guard, handler_call_details)
        if handler := self._intercepted.get(path):
            return handler
        handler = self._registered.get(path)
        if handler is None:
            found = (generic.service(handler_call_details) for generic in self._generic)
            handler = next((handler for handler in found if handler is not None), None)
        handler = self._intercept(handler, handler_call_details)
        if path in self._registered:
            self._intercepted[path] = handler
        return handler

    def _is_checked_unread(self, guard: _Guard, path: str) -> bool:
        handler = self._registered.get(path)
        if handler is None or handler.request_streaming or handler.response_streaming:
            return False
        if self._draining:
            return path not in guard.probes
        return path in guard.paths and guard.admission.strained()

    def _unread_handler(self, guard: _Guard, handler_call_details: grpc.HandlerCallDetails) -> Any:
        """The handler of a registered unary call, which reads the message only if admitted."""
        path = handler_call_details.method
        if path not in self._unread:
            check = partial(self._check_unread, guard, guard.paths.get(path, False))
            self._unread[path] = self._intercept(_unread(self._registered[path], check), handler_call_details)
        return self._unread[path]

    def _check_unread(self, guard: _Guard, interactive: bool, remaining: float | None) -> None:
        if self._draining:
            self.turned_away += 1
            raise DrainingError
        guard.admission.check_unread(identity.get(), remaining, interactive)

    def _intercept(self, handler: Any, details: grpc.HandlerCallDetails) -> Any:
        handler = handler and tolerant(handler)
        for interceptor in self._once:
            handler = _at_once(interceptor.intercept_service(_giving(handler), details))
        return handler


def _unread(handler: Any, check: Callable[[float | None], None]) -> Any:
    """A handler with one request, as one that asks for it itself."""

    async def call(requests: Any, context: Any) -> Any:
        check(context.time_remaining())
        request = await context.read()
        if request is grpc.aio.EOF:
            raise InvalidRequestError("the call has no message")
        return await handler.unary_unary(request, context)

    return grpc.stream_unary_rpc_method_handler(call, handler.request_deserializer, handler.response_serializer)


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
