"""Connections with unread answers: calls that are refused, and calls that must be answered."""

import asyncio
from collections.abc import Callable
from typing import Any

import grpc
import grpc.aio
import numpy as np
from support.calls import CallDetails
from support.models import random_network, served

from unroll_engine.async_engine import AsyncEngine
from unroll_proto.v1 import unroll_pb2 as pb
from unroll_server.middleware.access_log import CallObserver
from unroll_server.middleware.slow_readers import CONNECTION_BYTES, SMALL_BYTES, SlowReaders
from unroll_server.repository.catalog import Catalog
from unroll_server.sessions.chunk import Advance
from unroll_server.sessions.memory_store import MemoryStore
from unroll_server.sessions.service import Sessions
from unroll_server.telemetry.metrics import Metrics
from unroll_server.transport.registry import Registry

MODEL = served(random_network(features=3, hidden=8, outputs=4))


class Caller:
    """The context of a call on a connection on which nothing is read."""

    def __init__(self) -> None:
        self.status: grpc.StatusCode | None = None

    def peer(self) -> str:
        return "ipv4:127.0.0.1:1"

    def code(self) -> grpc.StatusCode | None:
        return self.status

    def add_done_callback(self, callback: Callable[[Any], None]) -> None:
        """Never done."""

    async def abort(self, code: grpc.StatusCode, details: str, trailers: Any) -> None:
        self.status = code
        raise grpc.aio.AbortError


async def test_a_session_that_has_moved_on_is_answered() -> None:
    """A refused caller retries, and the steps would count twice."""
    engine = AsyncEngine([MODEL], max_lanes=4, tick_steps=8, max_queued_steps=10**6)
    sessions = Sessions(MemoryStore(60.0, 10), Catalog([MODEL]), engine)
    values = np.zeros((5, 3), np.float32)

    async def classify(size: int, context: Any) -> pb.ClassifyResponse:
        return pb.ClassifyResponse(logits=bytes(size))

    async def advance(starts: int, context: Any) -> pb.AdvanceResponse:
        done = await sessions.advance(
            Advance("", "s", "m", 0, start=bool(starts), end=False, first_step=None, values=values)
        )
        return pb.AdvanceResponse(step=done.step, states=bytes(2 * SMALL_BYTES))

    registry = Registry(CallObserver(Metrics()), slow_readers=SlowReaders(Metrics()))
    registry.add_registered_method_handlers(
        "t",
        {
            "Classify": grpc.unary_unary_rpc_method_handler(classify, int, pb.ClassifyResponse.SerializeToString),
            "Advance": grpc.unary_unary_rpc_method_handler(advance, int, pb.AdvanceResponse.SerializeToString),
        },
    )

    async def call(method: str, request: int) -> bytes | grpc.StatusCode | None:
        """Returns the answer, or the status if it is not OK."""
        context = Caller()
        try:
            answer: bytes = await registry.service(CallDetails(f"/t/{method}")).unary_unary(b"%d" % request, context)
        except grpc.aio.AbortError:
            return context.status
        return answer

    def step_of(answer: bytes | grpc.StatusCode | None) -> int:
        assert isinstance(answer, bytes)
        return pb.AdvanceResponse.FromString(answer).step

    try:
        # Each call in its own task, as in a transport.
        assert step_of(await asyncio.create_task(call("Advance", 1))) == 5
        await asyncio.create_task(call("Classify", CONNECTION_BYTES - 3 * SMALL_BYTES - 64))
        full = grpc.StatusCode.RESOURCE_EXHAUSTED
        assert await asyncio.create_task(call("Classify", 2 * SMALL_BYTES)) is full
        assert step_of(await asyncio.create_task(call("Advance", 0))) == 10
        # Now it is refused before any work.
        assert await asyncio.create_task(call("Advance", 0)) is full
        kept = await sessions.store.get("", "s")
        assert kept is not None
        assert kept.session.snapshot.step == 10
    finally:
        await asyncio.to_thread(engine.close)
        await sessions.close()
