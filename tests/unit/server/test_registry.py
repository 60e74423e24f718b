"""What interceptors make of handlers: each asked as often as it needs to be, the outermost first."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

import grpc
import grpc.aio
import pytest
from support.calls import CallDetails

from unroll_server.addresses import Address
from unroll_server.transport.grpcio import GrpcioTransport
from unroll_server.transport.registry import Registry

UNARY = grpc.unary_unary_rpc_method_handler
Continuation = Callable[[grpc.HandlerCallDetails], Awaitable[Any]]


class Marker(grpc.aio.ServerInterceptor):
    """Puts its name before every answer and remembers the users that it was asked about."""

    def __init__(self, name: bytes, per_method: bool) -> None:
        self.per_method = per_method
        self.asked: list[Any] = []
        self._name = name

    async def intercept_service(self, continuation: Continuation, handler_call_details: Any) -> Any:
        self.asked.append(dict(handler_call_details.invocation_metadata).get("user"))
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        inner = handler.unary_unary

        async def marked(request: bytes, context: Any) -> bytes:
            answer: bytes = await inner(request, context)
            return self._name + answer

        return handler._replace(unary_unary=marked)


class Waits(grpc.aio.ServerInterceptor):
    per_method = True

    async def intercept_service(self, continuation: Continuation, handler_call_details: Any) -> Any:
        await asyncio.sleep(0)
        return await continuation(handler_call_details)


class Generic(grpc.GenericRpcHandler):
    """Answers what is registered nowhere, by the metadata of the call."""

    def service(self, handler_call_details: Any) -> Any:
        if handler_call_details.method != "/t/Generic":
            return None
        user = dict(handler_call_details.invocation_metadata)["user"]

        async def greet(request: bytes, context: Any) -> bytes:
            return bytes(user, "utf-8")

        return UNARY(greet)


async def echo(request: bytes, context: Any) -> bytes:
    return request


async def served(markers: list[Marker]) -> AsyncGenerator[Callable[[str, str], Awaitable[bytes]], None]:
    transport = GrpcioTransport(Address.of("--listen", "127.0.0.1:0"), markers, 1000)
    transport.registry.add_registered_method_handlers("t", {"Echo": UNARY(echo)})
    transport.registry.add_generic_rpc_handlers([Generic()])
    async with grpc.aio.insecure_channel(await transport.start()) as channel:

        async def call(method: str, user: str) -> bytes:
            stub: Any = channel.unary_unary(f"/t/{method}")
            try:
                answer: bytes = await stub(b"x", metadata=(("user", user),), timeout=30)
            except grpc.aio.AioRpcError as error:
                return error.code().name.encode()
            return answer

        yield call
    await transport.stop(0)


async def test_interceptors_are_asked_once_a_method_where_that_is_enough() -> None:
    markers = [Marker(b"a", True), Marker(b"b", False), Marker(b"c", True), Marker(b"d", True)]
    async with aclosing(served(markers)) as calls:
        call = await anext(calls)
        for user in ("x", "y", "z"):
            assert await call("Echo", user) == b"abcdx"
        # The one that is asked once stands outside one that must be asked for each call.
        assert [marker.asked for marker in markers] == [["x", "y", "z"], ["x", "y", "z"], ["x"], ["x"]]


async def test_generic_handlers_are_asked_for_each_call_and_intercepted() -> None:
    async with aclosing(served([Marker(b"a", True)])) as calls:
        call = await anext(calls)
        assert [await call("Generic", user) for user in ("x", "y")] == [b"ax", b"ay"]
        assert await call("Nothing", "x") == b"UNIMPLEMENTED"


async def test_an_interceptor_that_breaks_its_promise_is_found_out() -> None:
    registry = Registry([Waits()])
    registry.add_registered_method_handlers("t", {"Echo": UNARY(echo)})
    with pytest.raises(RuntimeError, match="waits for something"):
        registry.service(CallDetails("/t/Echo", ()))
