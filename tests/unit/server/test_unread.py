"""Answers that nobody reads: what is refused for them, and what must not be any more."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import numpy as np
import pytest
from support.calls import CallDetails
from support.models import random_network, served

from unroll_engine.async_engine import AsyncEngine
from unroll_engine.errors import OverloadedError
from unroll_proto.v1 import unroll_pb2 as pb
from unroll_server.middleware.slow_readers import OF_CONNECTION, SMALL, UnreadInterceptor
from unroll_server.repository.catalog import Catalog
from unroll_server.sessions.chunks import Advance
from unroll_server.sessions.memory import MemoryStore
from unroll_server.sessions.service import Sessions
from unroll_server.telemetry.metrics import Metrics

MODEL = served(random_network(features=3, hidden=8, outputs=4))


class Caller:
    """A connection on which nothing is read; its calls' context."""

    def peer(self) -> str:
        return "ipv4:127.0.0.1:1"

    def add_done_callback(self, callback: Callable[[Any], None]) -> None:
        """Never done."""


async def bounded(interceptor: UnreadInterceptor, behavior: Callable[[Any, Any], Awaitable[Any]]) -> Any:
    async def continuation(_: Any) -> Any:
        return grpc.unary_unary_rpc_method_handler(behavior)

    return (await interceptor.intercept_service(continuation, CallDetails("/m", ()))).unary_unary


async def test_a_session_that_has_moved_on_is_answered() -> None:
    """Whoever is told that there is no room asks again, and the steps would count twice."""
    engine = AsyncEngine([MODEL], max_lanes=4, tick_steps=8, max_queued_steps=10**6)
    sessions = Sessions(MemoryStore(60.0, 10), Catalog([MODEL]), engine)
    interceptor, connection = UnreadInterceptor(Metrics()), Caller()
    values = np.zeros((5, 3), np.float32)

    async def classify(request: int, context: Any) -> pb.ClassifyResponse:
        return pb.ClassifyResponse(logits=bytes(request))

    async def advance(request: bool, context: Any) -> pb.AdvanceResponse:
        done = await sessions.advance(
            Advance("", "s", "m", 0, start=request, end=False, first_step=None, values=values)
        )
        return pb.AdvanceResponse(step=done.step, states=bytes(2 * SMALL))

    asks, goes_on = await bounded(interceptor, classify), await bounded(interceptor, advance)
    try:
        # Each call in a task of its own, as the transport has it.
        assert (await asyncio.create_task(goes_on(True, connection))).step == 5
        await asyncio.create_task(asks(OF_CONNECTION - 3 * SMALL - 64, connection))
        with pytest.raises(OverloadedError):
            await asyncio.create_task(asks(2 * SMALL, connection))
        assert (await asyncio.create_task(goes_on(False, connection))).step == 10
        # From here on it is known before anything is done.
        with pytest.raises(OverloadedError):
            await asyncio.create_task(goes_on(False, connection))
        kept = await sessions.store.get("", "s")
        assert kept is not None
        assert kept.session.snapshot.step == 10
    finally:
        await asyncio.to_thread(engine.close)
        await sessions.close()
