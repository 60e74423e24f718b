"""Streams of the server without a transport."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Any

from unroll_engine.async_engine import AsyncEngine
from unroll_engine.models.loader import Model
from unroll_proto.v1 import unroll_pb2 as pb
from unroll_server.api.data_plane import DataPlane
from unroll_server.api.native.joiner import ChunkJoiner
from unroll_server.api.native.stream import Stream
from unroll_server.api.streams import RequestStream
from unroll_server.config import Limits
from unroll_server.identity.quotas import Quotas
from unroll_server.identity.tokens import Identities
from unroll_server.repository.catalog import Catalog
from unroll_server.sessions.memory_store import MemoryStore
from unroll_server.sessions.service import Sessions


def stream_of(catalog: Catalog, engine: AsyncEngine, limits: Limits) -> Stream:
    """One call of Unroll."""
    plane = DataPlane(catalog, engine, Sessions(MemoryStore(60.0, 1), catalog, engine), limits)
    return Stream(plane, Quotas(Identities(None)), ChunkJoiner(engine, limits.max_steps))


async def streamed(
    models: list[Model], limits: Limits, requests: Sequence[pb.UnrollRequest], max_queued_steps: int = 10**6
) -> list[pb.UnrollResponse]:
    """Returns a stream's answers to messages."""

    async def sent() -> AsyncIterator[pb.UnrollRequest]:
        for request in requests:
            yield request

    engine = AsyncEngine(models, max_lanes=4, tick_steps=4, max_queued_steps=max_queued_steps)
    try:
        async with asyncio.timeout(30):
            return [response async for response in answers_of(stream_of(Catalog(models), engine, limits), sent())]
    finally:
        await asyncio.to_thread(engine.close)


async def answers_of(stream: RequestStream, requests: AsyncIterator[Any]) -> AsyncGenerator[Any, None]:
    """Yields the answers of a stream, each written when the caller asks for it."""
    written: asyncio.Queue[Any] = asyncio.Queue(1)

    async def write(answer: Any) -> None:
        await written.put(answer)
        await written.join()

    running = asyncio.create_task(stream.run(requests, write))
    taking = asyncio.create_task(written.get())
    try:
        while True:
            await asyncio.wait({running, taking}, return_when=asyncio.FIRST_COMPLETED)
            if not taking.done():
                await running
                return
            yield taking.result()
            taking = asyncio.create_task(written.get())
            written.task_done()
    finally:
        running.cancel()
        taking.cancel()
        await asyncio.gather(running, taking, return_exceptions=True)
