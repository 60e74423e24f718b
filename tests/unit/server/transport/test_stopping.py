"""The end of a transport: it waits for calls in flight, and for nothing else."""

import asyncio
import socket
from typing import Any

import grpc
import grpc.aio
import pytest
from support.processes import PATIENCE
from support.transports import MAKERS, MakeTransport
from support.waiting import until

from unroll_server.addresses import Address
from unroll_server.middleware.access_log import CallObserver
from unroll_server.telemetry.metrics import Metrics
from unroll_server.transport.registry import Registry

pytestmark = MAKERS


class Server:
    """A server with one method, which answers on demand."""

    def __init__(self, make: MakeTransport) -> None:
        self.arrived, self.answers = asyncio.Event(), asyncio.Event()
        handler: grpc.RpcMethodHandler[bytes, bytes] = grpc.unary_unary_rpc_method_handler(self._wait)
        registry = Registry(CallObserver(Metrics()))
        registry.add_registered_method_handlers("t", {"Wait": handler})
        self.transport = make(Address.of("--listen", "127.0.0.1:0"), registry, 1000)

    async def _wait(self, request: bytes, context: Any) -> bytes:
        self.arrived.set()
        await self.answers.wait()
        return request


def listens(host: str, port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((host, port)) == 0


async def test_a_silent_connection_does_not_delay_the_end(make: MakeTransport) -> None:
    transport = Server(make).transport
    host, _, port = (await transport.start()).rpartition(":")
    with socket.create_connection((host, int(port)), timeout=PATIENCE):
        # The core alone would wait for 20 s.
        async with asyncio.timeout(15):
            assert await transport.stop(PATIENCE)


@pytest.mark.parametrize("grace", [0.0, PATIENCE])
async def test_an_end_without_calls_loses_none(make: MakeTransport, grace: float) -> None:
    transport = Server(make).transport
    async with grpc.aio.insecure_channel(await transport.start()) as channel:
        await channel.channel_ready()
        assert await transport.stop(grace)


async def test_an_end_waits_for_the_calls_in_flight(make: MakeTransport) -> None:
    server = Server(make)
    address = await server.transport.start()
    host, _, port = address.rpartition(":")
    async with grpc.aio.insecure_channel(address) as channel:
        wait: Any = channel.unary_unary("/t/Wait")
        call = asyncio.ensure_future(wait(b"x", timeout=PATIENCE))
        await server.arrived.wait()
        stopping = asyncio.create_task(server.transport.stop(PATIENCE))
        await until(lambda: not listens(host, int(port)))
        assert not stopping.done()
        server.answers.set()
        assert await call == b"x"
        assert await stopping


async def test_an_end_reports_that_it_cancelled_calls(make: MakeTransport) -> None:
    server = Server(make)
    async with grpc.aio.insecure_channel(await server.transport.start()) as channel:
        wait: Any = channel.unary_unary("/t/Wait")
        call = asyncio.ensure_future(wait(b"x", timeout=PATIENCE))
        await server.arrived.wait()
        assert not await server.transport.stop(0.0)
        with pytest.raises((grpc.aio.AioRpcError, asyncio.CancelledError)):
            await call
