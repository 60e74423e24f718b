"""Composed handlers: inside the middleware, outermost first, each layer composed once."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any

import grpc
import grpc.aio
import pytest

from unroll_server import caller
from unroll_server.addresses import Address
from unroll_server.middleware import Behavior, CallContext, Method
from unroll_server.middleware.access_log import CallObserver
from unroll_server.telemetry.metrics import Metrics
from unroll_server.transport.grpcio import GrpcioTransport
from unroll_server.transport.registry import Registry


class Marker:
    """Middleware that writes its name before and after each call, and remembers what it wrapped."""

    def __init__(self, name: str, trail: list[str]) -> None:
        self.wrapped: list[str] = []
        self._name = name
        self._trail = trail

    def wrap(self, method: Method) -> Behavior:
        self.wrapped.append(method.path)

        async def call(request: Any, context: CallContext) -> Any:
            self._trail.append(f"{self._name} begins")
            response = await method.behavior(request, context)
            self._trail.append(f"{self._name} ends")
            return response

        return call


async def double(request: bytearray, context: Any) -> bytearray:
    return 2 * request


async def letters(request: bytearray, context: Any) -> AsyncIterator[bytearray]:
    for letter in request:
        yield bytearray([letter])


async def each_doubled(requests: AsyncIterator[bytearray], context: Any) -> None:
    async for request in requests:
        await context.write(2 * request)


HANDLERS = {
    "Double": grpc.unary_unary_rpc_method_handler(double, bytearray, bytes),
    "Letters": grpc.unary_stream_rpc_method_handler(letters, bytearray, bytes),
    "EachDoubled": grpc.stream_stream_rpc_method_handler(each_doubled, bytearray, bytes),
}


async def serve(registry: Registry) -> AsyncGenerator[grpc.aio.Channel, None]:
    transport = GrpcioTransport(Address.of("--listen", "127.0.0.1:0"), registry, 1000)
    async with grpc.aio.insecure_channel(await transport.start()) as channel:
        yield channel
    await transport.stop(0)


async def test_every_kind_of_handler_runs_in_the_layers_of_its_method_which_are_made_once() -> None:
    trail: list[str] = []
    markers = [Marker("outer", trail), Marker("inner", trail)]
    registry = Registry(CallObserver(Metrics()), markers)
    registry.add_registered_method_handlers("t", HANDLERS)
    async with aclosing(serve(registry)) as served:
        channel: Any = await anext(served)
        unary, server_stream = channel.unary_unary("/t/Double"), channel.unary_stream("/t/Letters")
        stream = channel.stream_stream("/t/EachDoubled")
        for _ in range(2):
            assert await unary(b"x", timeout=30) == b"xx"
            assert [each async for each in server_stream(b"xyz", timeout=30)] == [b"x", b"y", b"z"]
            assert [each async for each in stream(iter([b"a", b"b"]), timeout=30)] == [b"aa", b"bb"]
    assert trail == 6 * ["outer begins", "inner begins", "inner ends", "outer ends"]
    for marker in markers:
        assert marker.wrapped == [f"/t/{name}" for name in HANDLERS]


async def test_a_method_that_does_not_exist_is_unimplemented() -> None:
    async with aclosing(serve(Registry(CallObserver(Metrics())))) as served:
        channel: Any = await anext(served)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await channel.unary_unary("/t/Nothing")(b"", timeout=30)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_each_call_has_an_object_of_its_own_which_the_tasks_that_it_starts_share() -> None:
    async def remember(request: bytearray, context: Any) -> bytes:
        seen = caller.current.get()

        async def own_task() -> bool:
            return caller.current.get() is seen and not seen.committed

        same = await asyncio.create_task(own_task())
        seen.committed = True
        return f"{seen.request_id} {same}".encode()

    registry = Registry(CallObserver(Metrics()))
    handler = grpc.unary_unary_rpc_method_handler(remember, bytearray, bytes)
    registry.add_registered_method_handlers("t", {"Remember": handler})
    async with aclosing(serve(registry)) as served:
        call: Any = (await anext(served)).unary_unary("/t/Remember")
        names = [await call(b"", metadata=(("x-request-id", name),), timeout=30) for name in ("a", "b")]
    assert names == [b"a True", b"b True"]


@pytest.mark.parametrize(
    "handler",
    [
        grpc.unary_unary_rpc_method_handler(lambda request, context: request),
        grpc.stream_unary_rpc_method_handler(double),
    ],
)
def test_handlers_that_can_not_be_composed_are_refused(handler: Any) -> None:
    with pytest.raises(TypeError, match="/t/Wrong: an asynchronous handler is expected"):
        Registry(CallObserver(Metrics())).add_registered_method_handlers("t", {"Wrong": handler})
