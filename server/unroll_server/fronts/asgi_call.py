"""One gRPC call over ASGI: what is sent of it, and how it ends."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio

from unroll_server import calls
from unroll_server.fronts.asgi_context import Context, Event
from unroll_server.fronts.grpc_wire import (
    ACCEPT_ENCODING,
    Metadata,
    WireError,
    compressed_frame,
    encode_metadata,
    encode_status,
    frame,
)

if TYPE_CHECKING:
    from unroll_server.fronts.asgi_streams import Requests, Responses

Receive = Callable[[], Awaitable[Event]]
Send = Callable[[Event], Awaitable[None]]

_HEADERS = [(b"content-type", b"application/grpc"), (b"grpc-accept-encoding", ACCEPT_ENCODING)]
_START: Event = {"type": "http.response.start", "status": 200, "headers": _HEADERS, "trailers": True}
_OK: Event = {"type": "http.response.trailers", "headers": [(b"grpc-status", b"0")], "more_trailers": False}
_EXPIRED = (grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded")
PIECE = 128 * 1024
"""Bytes of a response that the transport is given at once."""


def piece(body: bytes, more: bool) -> Event:
    """A piece of the response's body, as ASGI has it."""
    return {"type": "http.response.body", "body": body, "more_body": more}


class Call(Context):
    """A call, which is its servicer's context too.

    Args:
        scope: ASGI's.
        headers: The request's; of repeated ones the last.
        receive: ASGI's.
        send: ASGI's.
    """

    # Class attributes stand for what most calls never set: a call costs its constructor.
    codec: bytes | None = None
    """How the caller compresses its messages; None for not at all."""
    heard: calls.Call | None = None
    """Who hears of its end."""
    requests: "Requests | None" = None
    responses: "Responses | None" = None
    watched = False
    """Whether the request is read, so that all that can still come is word that the caller has left."""
    receiving: asyncio.Future[Event] | None = None
    round = 0
    """When the front last looked whether the caller is there, by its own count."""
    _left = False
    _initial: Metadata = ()
    _timer: asyncio.TimerHandle | None = None
    _farewell: asyncio.Task[None] | None = None

    def __init__(self, scope: Event, headers: Mapping[bytes, bytes], receive: Receive, send: Send) -> None:
        super().__init__(scope, headers)
        self.receive = receive
        self.send = send
        self._task = asyncio.current_task(self.loop)

    # Ends from outside.

    def begin(self) -> None:
        """From here on the deadline, if there is one, cancels.

        Raises:
            WireError: DEADLINE_EXCEEDED where it has passed.
        """
        if self.deadline is None:
            return
        if self.deadline <= self.loop.time():
            raise WireError(*_EXPIRED)
        self._timer = self.loop.call_at(self.deadline, self.end_with, *_EXPIRED)

    def end_with(self, code: grpc.StatusCode, details: str) -> None:
        """Cancels the servicer and ends the call with this status."""
        if self.over or self.ended_by or self._task is None:
            return
        self.ended_by = (code, details)
        if self.requests or self.watched:
            self._task.cancel()
        else:
            # To cancel what waits for the transport would leave it with a future that nobody owns. The call is answered
            # beside it; the transport, which has no more to read then, lets it go.
            self._farewell = asyncio.ensure_future(self._part(code, details))

    async def _part(self, code: grpc.StatusCode, details: str) -> None:
        with suppress(OSError):
            await self.fail(code, details)

    def leave(self) -> None:
        """Cancels the servicer, because the caller has left and nobody hears a status."""
        self._left = True
        self.end_with(grpc.StatusCode.CANCELLED, "the caller left")

    def pull(self) -> None:
        """Asks for the next piece of the request, or for word that the caller has left."""
        self.receiving = asyncio.ensure_future(self.receive())
        self.receiving.add_done_callback(self._pulled)

    def _pulled(self, received: asyncio.Future[Event]) -> None:
        self.receiving = None
        if self.over or received.cancelled():
            return
        if received.exception() or (event := received.result())["type"] == "http.disconnect":
            self.leave()
        elif self.requests:
            self.requests.take(event.get("body", b""), event.get("more_body", False))

    def close(self) -> None:
        """Lets go of what the call holds and tells those who asked to be told; nothing is sent after it."""
        self.over = True
        if self._timer:
            self._timer.cancel()
        if self.heard:
            self.heard.end((self.ended_by[0] if self.ended_by else self.code()).value[0])
        # A future of the transport's own is left to it; it ends with the stream.
        if isinstance(self.receiving, asyncio.Task):
            self.receiving.cancel()
        for callback in self._callbacks:
            callback(self)

    # What is sent.

    def frame(self, message: bytes) -> bytes:
        """The message with its header, compressed where that was asked for."""
        if self._compression and self._compress_next:
            return compressed_frame(message, self._compression)
        self._compress_next = True
        return frame(message)

    async def send_piece(self, body: bytes) -> None:
        """Sends the headers, if they are not sent, and a part of the body that is not the last."""
        if not self.started:
            await self.send(self._start())
        await self.send(piece(await self._but_last(body), True))

    async def finish(self, body: bytes) -> None:
        """Sends the rest of the body and the status that the servicer left, OK where it left none."""
        self.over = True
        if not body and not self.started and self._status not in (None, grpc.StatusCode.OK):
            await self._trailers_only(self._trailers())
            return
        if not self.started:
            await self.send(self._start())
        await self.send(piece(await self._but_last(body), False))
        await self.send(self._trailers() if self._status or self._trailing or self._details else _OK)

    async def _but_last(self, body: bytes) -> bytes:
        """Sends a part of the body but for its last piece, which it returns."""
        begin = 0
        while len(body) - begin > PIECE:
            # What Envoy is given at once it takes, however slowly the caller reads; between pieces it can let us wait.
            await self.send(piece(body[begin : begin + PIECE], True))
            begin += PIECE
        return body[begin:] if begin else body

    async def fail(self, code: grpc.StatusCode, details: str) -> None:
        """Ends the call with a status that is not its servicer's; nothing where it has ended or the caller has left."""
        if self.over:
            return
        self.over = True
        if self._left:
            return
        self._status, self._details = code, details
        if self.started:
            await self.send(piece(b"", False))
            await self.send(self._trailers())
        else:
            await self._trailers_only(self._trailers())

    def _start(self) -> Event:
        self.started = True
        if not self._initial and not self._compression:
            return _START
        headers = [*_HEADERS, *encode_metadata(self._initial)]
        if self._compression:
            headers.append((b"grpc-encoding", self._compression))
        return {**_START, "headers": headers}

    def _trailers(self) -> Event:
        code: int = (self._status or grpc.StatusCode.OK).value[0]
        try:
            metadata = encode_metadata(self._trailing)
        except ValueError as error:
            code, self._details, metadata = grpc.StatusCode.INTERNAL.value[0], str(error), []
        return {**_OK, "headers": [*encode_status(code, self._details), *metadata]}

    async def _trailers_only(self, trailers: Event) -> None:
        self.started = True
        headers = [*_HEADERS, *encode_metadata(self._initial), *trailers["headers"]]
        await self.send({"type": "http.response.start", "status": 200, "headers": headers})
        await self.send(piece(b"", False))

    # What a servicer reads and sends.

    async def read(self) -> Any:
        """See grpc.aio.ServicerContext."""
        if self.requests is None:
            raise grpc.aio.UsageError("this method has one request, which its servicer was given")
        return await self.requests.read()

    async def write(self, message: Any) -> None:
        """See grpc.aio.ServicerContext."""
        if self.responses is None:
            raise grpc.aio.UsageError("this method has one response, which its servicer returns")
        self.responses.put(message)
        self.responses.flush()
        await self.responses.room()

    async def send_initial_metadata(self, initial_metadata: Metadata) -> None:
        """See grpc.aio.ServicerContext."""
        if self.started:
            raise RuntimeError("initial metadata is sent already")
        self._initial = tuple(initial_metadata)
        encode_metadata(self._initial)
        await self.send_piece(b"")
