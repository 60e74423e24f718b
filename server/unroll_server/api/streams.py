"""Streams of both APIs: calls with many requests, which drain with their server."""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from unroll_server.errors import DrainingError


class RequestStream(ABC):
    """One call with many requests.

    Attributes:
        draining: Set once the stream drains.
    """

    def __init__(self) -> None:
        self.draining = asyncio.Event()
        self._half_close_timeout = 0.0

    def drain(self, half_close_timeout: float) -> None:
        """Stops reading requests. The call ends once the requests read before are answered.

        Args:
            half_close_timeout: Seconds within which the caller may then half-close the stream.
        """
        self._half_close_timeout = half_close_timeout
        self.draining.set()

    @abstractmethod
    async def run(self, requests: AsyncIterator[Any], write: Callable[[Any], Awaitable[None]]) -> None:
        """Answers until the caller has half-closed and all its requests are answered, or until the stream drains.

        Args:
            requests: Messages of the caller.
            write: Writes an answer; returns when the transport has taken it.

        Raises:
            DrainingError: the stream drained before it accepted every request; the accepted ones are answered.
        """

    @abstractmethod
    async def read(self, requests: AsyncIterator[Any]) -> None:
        """Reads the requests and begins to answer them; while the stream drains, skips them."""

    @abstractmethod
    async def all_answered(self) -> None:
        """Waits until all accepted requests are answered."""

    @abstractmethod
    def is_complete(self, half_closed: bool) -> bool:
        """Returns True if a drained stream has accepted all of its caller's requests."""

    def close_sequences(self) -> None:  # noqa: B027 (a stream may have nothing to close)
        """Writes the last answers of a stream that drains."""

    async def serve(self, requests: AsyncIterator[Any]) -> None:
        """Reads and answers all requests, or those before the stream drains; see `run`."""
        reading = asyncio.create_task(self.read(requests))
        draining = asyncio.create_task(self.draining.wait())
        try:
            await asyncio.wait({reading, draining}, return_when=asyncio.FIRST_COMPLETED)
            if reading.done():
                reading.result()
            await self.all_answered()
            if self.draining.is_set():
                self.close_sequences()
                # A caller whose write fails because the call has ended may never see the answers and the status that
                # are in transit (grpc.aio drops them), so its messages are still read.
                _, open_ended = await asyncio.wait({reading}, timeout=self._half_close_timeout)
                if not self.is_complete(half_closed=not open_ended):
                    raise DrainingError("all of this stream")
        finally:
            reading.cancel()
            draining.cancel()
            await asyncio.gather(reading, draining, return_exceptions=True)


class OpenStreams:
    """The open streams of a service, which drain together.

    Attributes:
        draining: True once they drain.
    """

    def __init__(self) -> None:
        self._streams: set[RequestStream] = set()
        self._half_close_timeout = 0.0
        self.draining = False

    def drain(self, half_close_timeout: float) -> None:
        """Drains every stream, and later streams at once; see RequestStream.drain."""
        self.draining = True
        self._half_close_timeout = half_close_timeout
        for stream in self._streams:
            stream.drain(half_close_timeout)

    async def run(
        self, stream: RequestStream, requests: AsyncIterator[Any], write: Callable[[Any], Awaitable[None]]
    ) -> None:
        """Runs a stream to its end; see RequestStream.run."""
        if self.draining:
            stream.drain(self._half_close_timeout)
        self._streams.add(stream)
        try:
            await stream.run(requests, write)
        finally:
            self._streams.remove(stream)
