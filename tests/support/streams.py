"""Streams of the server without a transport: their answers as a caller takes them."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

from unroll_server.api.streams import RequestStream


async def answers_of(stream: RequestStream, requests: AsyncIterator[Any]) -> AsyncGenerator[Any, None]:
    """Yields the answers of a stream: the next one is written when the caller asks for it."""
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
