"""The two directions of a streaming call: requests as they are read, responses as the transport takes them."""

import asyncio
import types
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator, Iterator
from typing import Any, Self

import grpc
import grpc.aio

from unroll_server.fronts.asgi_call import PIECE, Call, piece
from unroll_server.fronts.grpc_wire import FrameReader, WireError

HIGH_WATER = 64 * 1024
"""Bytes of responses that wait for the transport; past it the servicer waits."""


class Requests:
    """The requests of a call, one piece of the body read ahead and no more.

    The piece read ahead is what tells at once that the caller has left.

    Args:
        call: The call.
        deserialize: Bytes of a request to the request.
        limit: The largest message in bytes.
    """

    def __init__(self, call: Call, deserialize: Callable[[bytes], Any], limit: int) -> None:
        self._call = call
        self._deserialize = deserialize
        self._reader = FrameReader(limit, call.codec)
        self._messages = self._reader.messages
        self._ended = False
        self.unread = 0
        """Bytes taken since the servicer had read all that there was."""
        self._arrival: asyncio.Future[None] | None = None

    def take(self, body: bytes, more: bool) -> None:
        """Takes a piece of the request's body, the last one where no more come."""
        if self._ended:
            return
        self.unread += len(body)
        try:
            self._reader.feed(body)
            if not more and self._reader.waiting:
                raise WireError(grpc.StatusCode.INTERNAL, "the request ends within a message")
        except WireError as error:
            self._call.end_with(error.code, error.details)
            return
        if not more:
            self._ended = self._call.watched = True
        elif not self._messages:
            self._call.pull()
        if self._arrival and not self._arrival.done() and (self._messages or self._ended):
            self._arrival.set_result(None)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Any:
        if not self._messages and not await self._arrives():
            raise StopAsyncIteration
        return await self._next()

    async def read(self) -> Any:
        """The next request, grpc.aio.EOF where the caller has half-closed."""
        if not self._messages and not await self._arrives():
            return grpc.aio.EOF
        return await self._next()

    def in_thread(self) -> Iterator[Any]:
        """The requests, for a servicer that runs in a thread."""
        while (request := asyncio.run_coroutine_threadsafe(self.read(), self._call.loop).result()) is not grpc.aio.EOF:
            yield request

    async def _arrives(self) -> bool:
        """Waits for a request; False where none comes any more."""
        while not self._messages and not self._ended:
            if not self._call.receiving:
                self._call.pull()
            self._arrival = self._call.loop.create_future()
            await self._arrival
        return bool(self._messages)

    async def _next(self) -> Any:
        message = self._messages.popleft()
        if not self._messages:
            self.unread = 0
            if not self._ended and not self._call.receiving:
                self._call.pull()
        return self._deserialize(message)


class Responses:
    """The responses of a call: those that are ready together go out as one piece of the body.

    Args:
        call: The call.
        serialize: A response to its bytes.
    """

    def __init__(self, call: Call, serialize: Callable[[Any], bytes]) -> None:
        self._call = call
        self._serialize = serialize
        self._frames: list[bytes] = []
        self._sending: asyncio.Future[None] | None = None
        self._sent: asyncio.Future[None] | None = None
        self.waiting = 0
        """Bytes that wait for the transport to take what it was given before."""

    def put(self, message: Any) -> None:
        """Adds a response; `flush` sends it."""
        data = self._call.frame(self._serialize(message))
        self._frames.append(data)
        self.waiting += len(data)

    def flush(self) -> None:
        """Gives the transport all that waits, if it has taken what it was given before; else once it has."""
        if self._frames and not self._sending:
            self._give(self._take())

    def probe(self) -> None:
        """Gives the transport nothing to send, which it refuses where the caller has left."""
        if not self._sending:
            self._give(b"")

    def _give(self, body: bytes) -> None:
        call = self._call
        simple = call.started and len(body) <= PIECE
        self._sending = asyncio.ensure_future(call.send(piece(body, True)) if simple else call.send_piece(body))
        self._sending.add_done_callback(self._was_sent)

    def _take(self) -> bytes:
        body = self._frames[0] if len(self._frames) == 1 else b"".join(self._frames)
        self._frames.clear()
        self.waiting = 0
        return body

    def _was_sent(self, sending: asyncio.Future[None]) -> None:
        self._sending = None
        if sending.cancelled() or sending.exception():
            self._call.leave()
            return
        if not self._call.over:
            self.flush()
        if self._sent and not self._sent.done():
            self._sent.set_result(None)

    async def room(self) -> None:
        """Waits until the servicer may go on."""
        self.flush()
        while self.waiting >= HIGH_WATER:
            await self._transport()

    async def finish(self) -> None:
        """Sends the rest and the status."""
        while self._sending:
            await self._transport()
        await self._call.finish(self._take())

    async def _transport(self) -> None:
        self._sent = self._call.loop.create_future()
        await self._sent

    async def drain(self, generator: AsyncGenerator[Any, None]) -> None:
        """Sends all that the generator yields; what it yields without waiting in between goes out together."""
        try:
            while True:
                step: Coroutine[Any, Any, Any] = generator.__anext__()
                try:
                    waits_for = step.send(None)
                except StopIteration as ready:
                    self.put(ready.value)
                else:
                    # Before the servicer waits, all that it has said is sent.
                    self.flush()
                    self.put(await _resume(step, waits_for))
                if self.waiting >= HIGH_WATER:
                    await self.room()
        except StopAsyncIteration:
            pass
        finally:
            await generator.aclose()


@types.coroutine
def _resume(step: Coroutine[Any, Any, Any], waits_for: Any) -> Generator[Any, Any, Any]:
    """Goes on with a coroutine that was begun by hand and waits."""
    try:
        while True:
            try:
                sent = yield waits_for
            except BaseException as error:
                waits_for = step.throw(error)
            else:
                waits_for = step.send(sent)
    except StopIteration as done:
        return done.value
