"""In-process servers, each on its own event loop and port, that tests can break."""

import asyncio
import threading
from collections import Counter
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeVar

import grpc
import grpc.aio
from support.models import random_network, served

from unroll_engine.async_engine import AsyncEngine
from unroll_engine.models.loader import Model
from unroll_proto.v1 import unroll_pb2 as pb
from unroll_proto.v1 import unroll_pb2_grpc
from unroll_server.addresses import Address
from unroll_server.api.data_plane import DataPlane
from unroll_server.api.native.service import UnrollService
from unroll_server.config import Limits
from unroll_server.identity.quotas import Quotas
from unroll_server.identity.tokens import Identities
from unroll_server.middleware import Behavior, CallContext, Method
from unroll_server.middleware.access_log import CallObserver
from unroll_server.repository.catalog import Catalog
from unroll_server.sessions.memory_store import MemoryStore
from unroll_server.sessions.service import Sessions
from unroll_server.telemetry.metrics import Metrics
from unroll_server.transport.grpcio import GrpcioTransport
from unroll_server.transport.registry import Registry

T = TypeVar("T")

LIMITS = Limits(max_sequences=8, max_steps=64, max_open_sequences=100, max_message_bytes=4096)
MODEL = served(random_network(), "m")
TWO_LAYERS = served(random_network(layers=2), "deep")
BINARY = served(random_network(outputs=1), "binary")


def _steep() -> Model:
    network = random_network()
    network.std.fill_(0.01)
    return served(network, "m")


STEEP = _steep()
"""A model in which 3e38 becomes infinite and the state NaN."""


class LoopThread:
    """An event loop on its own thread."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(30)

    def stop(self) -> None:
        self.run(self._end())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()

    async def _end(self) -> None:
        """Waits for cancelled calls, since grpc.aio's `stop` does not and the loop must be empty to close."""
        while others := asyncio.all_tasks() - {asyncio.current_task()}:
            await asyncio.wait(others)
        await self.loop.shutdown_asyncgens()


class Counting:
    """Middleware that counts the calls of each method, and the messages of streams by their action."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.messages: Counter[str | None] = Counter()

    def wrap(self, method: Method) -> Behavior:
        async def call(request: Any, context: CallContext) -> Any:
            self.calls[method.path.rpartition("/")[2]] += 1
            return await method.behavior(self._read(request) if method.request_streaming else request, context)

        return call

    async def _read(self, requests: AsyncIterator[pb.UnrollRequest]) -> AsyncIterator[pb.UnrollRequest]:
        async for request in requests:
            self.messages[request.WhichOneof("action")] += 1
            yield request


class LocalServer:
    """The service over models of random weights.

    Attributes:
        address: HOST:PORT.
        calls: Number of calls of each method.
        messages: Messages of streams by their action.
    """

    def __init__(self, *models: Model, limits: Limits = LIMITS, port: int = 0, queued: int = 10**6) -> None:
        self._thread = LoopThread()
        self._open = True
        self._counting = Counting()
        self.calls, self.messages = self._counting.calls, self._counting.messages
        self.address = self._thread.run(self._start(models, limits, port, queued))

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])

    def drain(self) -> None:
        """Drains all streams, as a stopping server does, and refuses new calls."""
        self._thread.loop.call_soon_threadsafe(self._service.drain, 1.0)

    def stop(self) -> None:
        """Cancels every call and stops."""
        if self._open:
            self._open = False
            self._thread.run(self._transport.stop(0))
            self._thread.stop()
            self._engine.close()

    async def _start(self, models: tuple[Model, ...], limits: Limits, port: int, queued: int) -> str:
        self._engine = AsyncEngine(models, max_lanes=16, tick_steps=4, max_queued_steps=queued)
        catalog = Catalog(models)
        sessions = Sessions(MemoryStore(3600, 1000), catalog, self._engine)
        self._service = UnrollService(DataPlane(catalog, self._engine, sessions, limits), Quotas(Identities(None)))
        address = Address.of("--listen", f"127.0.0.1:{port}")
        registry: Any = Registry(CallObserver(Metrics()), [self._counting])
        self._transport = GrpcioTransport(address, registry, limits.max_message_bytes)
        unroll_pb2_grpc.add_UnrollServiceServicer_to_server(self._service, registry)
        return await self._transport.start()


class ScriptedServer:
    """A server of any servicer, for answers that the real one never gives.

    Attributes:
        address: HOST:PORT.
    """

    def __init__(self, servicer: unroll_pb2_grpc.UnrollServiceServicer) -> None:
        self._thread = LoopThread()
        self.address = self._thread.run(self._start(servicer))

    def stop(self) -> None:
        self._thread.run(self._server.stop(0))
        self._thread.stop()

    async def _start(self, servicer: unroll_pb2_grpc.UnrollServiceServicer) -> str:
        self._server = grpc.aio.server()
        unroll_pb2_grpc.add_UnrollServiceServicer_to_server(servicer, self._server)
        port = self._server.add_insecure_port("127.0.0.1:0")
        await self._server.start()
        return f"127.0.0.1:{port}"
