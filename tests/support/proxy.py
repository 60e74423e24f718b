"""A TCP proxy that breaks connections after given numbers of bytes."""

import asyncio
from collections.abc import Iterable
from contextlib import suppress
from types import TracebackType
from typing import Self


class CuttingProxy:
    """Forwards to a server, on a free port of the loopback interface; an async context manager.

    Args:
        server: HOST:PORT.
        cuts: Bytes, of both directions together, after which each new connection is reset; later ones are not.

    Attributes:
        address: HOST:PORT.
        broken: Connections that were reset.
    """

    def __init__(self, server: str, cuts: Iterable[int] = ()) -> None:
        host, _, port = server.rpartition(":")
        self._server = (host, int(port))
        self._cuts = iter(cuts)
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._left: dict[asyncio.StreamWriter, int | None] = {}
        self.broken = 0

    def cut(self) -> None:
        """Resets every connection."""
        for writer in self._writers:
            writer.transport.abort()

    async def __aenter__(self) -> Self:
        self._listener = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.address = f"127.0.0.1:{self._listener.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._listener.close()
        self.cut()
        while self._tasks:
            await asyncio.wait(self._tasks)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        self._left[writer] = next(self._cuts, None)
        self._writers.add(writer)
        with suppress(OSError):
            there, back = await asyncio.open_connection(*self._server)
            self._writers.add(back)
            ways = {
                asyncio.create_task(self._forward(reader, back, writer)),
                asyncio.create_task(self._forward(there, writer, writer)),
            }
            # The end of either side ends both.
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            back.transport.abort()
            writer.transport.abort()
            await asyncio.wait(ways)
            self._writers.discard(back)
        writer.transport.abort()
        self._writers.discard(writer)

    async def _forward(
        self, reader: asyncio.StreamReader, to: asyncio.StreamWriter, client: asyncio.StreamWriter
    ) -> None:
        with suppress(OSError):
            while data := await reader.read(1 << 16):
                left = self._left[client]
                to.write(data[:left])
                await to.drain()
                if left is not None:
                    self._left[client] = left - len(data)
                    if left <= len(data):
                        self.broken += 1
                        return
