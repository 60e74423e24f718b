"""Connections to one server that are replaced when they end."""

import asyncio
import ssl
from collections.abc import Callable
from dataclasses import dataclass

from unroll_bench.load.connecting import connect
from unroll_bench.load.frames import Headers, request_headers
from unroll_bench.load.h2 import Connection
from unroll_bench.load.result import Tally

_FIRST_DELAY = 0.02
_LONGEST_DELAY = 1.0


@dataclass(frozen=True, slots=True)
class Peer:
    """The server to drive, and the properties of every call.

    Attributes:
        address: HOST:PORT, [IPV6]:PORT, or unix:PATH.
        tls: Context for TLS, with `set_alpn_protocols(["h2"])`; None for plaintext.
        metadata: Names (lower case) and values sent with each call, as ("authorization", "Bearer ...").
        timeout: Deadline of each unary call in seconds, sent to the server; None for none.
    """

    address: str
    tls: ssl.SSLContext | None = None
    metadata: tuple[tuple[str, str], ...] = ()
    timeout: float | None = None

    def headers(self, path: str, *, deadline: bool = True) -> Headers:
        """Returns the headers of a call of `path`."""
        authority = "localhost" if self.address.startswith("unix:") else self.address
        metadata = list(self.metadata)
        if deadline and self.timeout is not None:
            metadata.append(("grpc-timeout", _timeout(self.timeout)))
        return request_headers(path, authority, "https" if self.tls else "http", metadata)


def _timeout(seconds: float) -> str:
    # At most eight digits (PROTOCOL-HTTP2.md of gRPC).
    for unit, scale in (("u", 1e6), ("m", 1e3), ("S", 1.0)):
        if seconds * scale < 1e8:
            return f"{max(round(seconds * scale), 1)}{unit}"
    return "99999999S"


class Pool:
    """A fixed number of connections, each replaced when it can't take more calls.

    Args:
        peer: The server.
        size: Number of connections.
        tally: Counts failed attempts to connect as errors.
        on_ready: Called with the index of a connection that was replaced.
    """

    def __init__(self, peer: Peer, size: int, tally: Tally, on_ready: Callable[[int], None]) -> None:
        self._peer = peer
        self._size = size
        self._tally = tally
        self._on_ready = on_ready
        self._all: list[Connection] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False
        self.lines: list[Connection] = []

    async def open(self) -> None:
        """Makes all connections.

        Raises:
            OSError: one can't be made.
            ValueError: the address is not one.
        """
        for _ in range(self._size):
            self.lines.append(await self._connect())

    async def close(self) -> None:
        """Ends all connections; calls in flight end with CANCELLED."""
        self._closed = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for line in self._all:
            await line.close()

    async def _connect(self) -> Connection:
        line = await connect(self._peer.address, self._lost, tls=self._peer.tls)
        self._all.append(line)
        return line

    def _lost(self, line: Connection) -> None:
        # The code that makes a connection handles one that is not in use yet.
        if not self._closed and line in self.lines:
            task = asyncio.get_running_loop().create_task(self._replace(self.lines.index(line), line.was_used))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _replace(self, index: int, at_once: bool) -> None:
        delay = _FIRST_DELAY
        while True:
            if not at_once:
                await asyncio.sleep(delay)
                delay = min(2 * delay, _LONGEST_DELAY)
            at_once = False
            try:
                line = await self._connect()
            except OSError as error:
                self._tally.errors[f"connect: {error.strerror or error}"] += 1
            else:
                self.lines[index] = line
                if line.usable:
                    self._on_ready(index)
                    return
