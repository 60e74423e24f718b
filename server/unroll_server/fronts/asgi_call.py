"""One gRPC call over ASGI: what its servicer sees of it, and how it ends."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any, NoReturn

import grpc
import grpc.aio

from unroll_server.fronts.grpc_wire import (
    ACCEPT_ENCODING,
    CODECS,
    Metadata,
    WireError,
    compressed_frame,
    decode_metadata,
    encode_metadata,
    encode_status,
    frame,
)

if TYPE_CHECKING:
    from unroll_server.fronts.asgi_streams import Requests, Responses

Event = dict[str, Any]
Receive = Callable[[], Awaitable[Event]]
Send = Callable[[Event], Awaitable[None]]

_HEADERS = [(b"content-type", b"application/grpc"), (b"grpc-accept-encoding", ACCEPT_ENCODING)]
_START: Event = {"type": "http.response.start", "status": 200, "headers": _HEADERS, "trailers": True}
_OK: Event = {"type": "http.response.trailers", "headers": [(b"grpc-status", b"0")], "more_trailers": False}
_EXPIRED = (grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded")
_CODEC_OF = {grpc.Compression.Gzip: b"gzip", grpc.Compression.Deflate: b"deflate"}


def piece(body: bytes, more: bool) -> Event:
    """A piece of the response's body, as ASGI has it."""
    return {"type": "http.response.body", "body": body, "more_body": more}


class Call(grpc.aio.ServicerContext[Any, Any]):
    """The context of a call; see grpc.aio.ServicerContext for what a servicer may do with it.

    Args:
        scope: ASGI's.
        headers: The request's; of repeated ones the last.
        receive: ASGI's.
        send: ASGI's.
    """

    # Class attributes stand for what most calls never set: a call costs its constructor.
    deadline: float | None = None
    """When the caller gives up, by the loop's clock."""
    codec: bytes | None = None
    """How the caller compresses its messages; None for not at all."""
    requests: "Requests | None" = None
    responses: "Responses | None" = None
    started = False
    """Whether the response's headers are on their way."""
    over = False
    """Whether the last of the response is on its way, or nobody is there to read it."""
    watched = False
    """Whether the request is read, so that all that can still come is word that the caller has left."""
    receiving: asyncio.Future[Event] | None = None
    round = 0
    """When the front last looked whether the caller is there, by its own count."""
    ended_by: tuple[grpc.StatusCode, str] | None = None
    """What ended the call from outside its servicer."""
    _left = False
    _aborted = False
    _status: grpc.StatusCode | None = None
    _details = ""
    _trailing: Metadata = ()
    _initial: Metadata = ()
    _compression: bytes | None = None
    _compress_next = True
    _timer: asyncio.TimerHandle | None = None
    _callbacks: tuple[Callable[[Any], None], ...] = ()

    def __init__(self, scope: Event, headers: Mapping[bytes, bytes], receive: Receive, send: Send) -> None:
        self.loop = loop = asyncio.get_running_loop()
        self.scope = scope
        self.headers = headers
        self.receive = receive
        self.send = send
        self._task = asyncio.current_task(loop)

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
        self._task.cancel()

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
        """Sends the headers, if they are not sent, and a piece of the body that is not the last."""
        if not self.started:
            await self.send(self._start())
        await self.send(piece(body, True))

    async def finish(self, body: bytes) -> None:
        """Sends the rest of the body and the status that the servicer left, OK where it left none."""
        self.over = True
        if not body and not self.started and self._status not in (None, grpc.StatusCode.OK):
            await self._trailers_only(self._trailers())
            return
        if not self.started:
            await self.send(self._start())
        await self.send(piece(body, False))
        await self.send(self._trailers() if self._status or self._trailing or self._details else _OK)

    async def fail(self, code: grpc.StatusCode, details: str) -> None:
        """Ends the call with a status that is not the servicer's; nothing where the caller has left."""
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

    # grpc.aio.ServicerContext

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

    async def abort(self, code: grpc.StatusCode, details: str = "", trailing_metadata: Metadata = ()) -> NoReturn:
        """See grpc.aio.ServicerContext."""
        self.set_abort(code, details, trailing_metadata)
        raise grpc.aio.AbortError("the servicer ended the call")

    async def abort_with_status(self, status: grpc.Status) -> NoReturn:
        """See grpc.aio.ServicerContext."""
        await self.abort(status.code, status.details, status.trailing_metadata or ())

    def set_abort(self, code: grpc.StatusCode, details: str, trailing_metadata: Metadata) -> None:
        """Leaves the status of an abort; its caller raises."""
        if self._aborted:
            raise grpc.aio.UsageError("abort was called already")
        self._aborted = True
        # A call can't be aborted into a good end.
        self._status = grpc.StatusCode.UNKNOWN if code is grpc.StatusCode.OK else code
        self._details = details or self._details
        self._trailing = tuple(trailing_metadata) or self._trailing

    def set_code(self, code: grpc.StatusCode) -> None:
        """See grpc.aio.ServicerContext."""
        self._status = code

    def set_details(self, details: str) -> None:
        """See grpc.aio.ServicerContext."""
        self._details = details

    def set_trailing_metadata(self, trailing_metadata: Metadata) -> None:
        """See grpc.aio.ServicerContext."""
        self._trailing = tuple(trailing_metadata)
        encode_metadata(self._trailing)

    def set_code_unless_bad(self, code: grpc.StatusCode) -> None:
        """Sets the code where the servicer has set none, or OK."""
        if self._status in (None, grpc.StatusCode.OK):
            self._status = code

    def code(self) -> grpc.StatusCode:
        """See grpc.aio.ServicerContext."""
        return self._status or grpc.StatusCode.OK

    def details(self) -> str:
        """See grpc.aio.ServicerContext."""
        return self._details

    def trailing_metadata(self) -> Any:
        """See grpc.aio.ServicerContext."""
        return self._trailing

    def invocation_metadata(self) -> Any:
        """See grpc.aio.ServicerContext."""
        return decode_metadata(self.scope["headers"])

    def time_remaining(self) -> float | None:  # type: ignore[override]  # grpc.aio gives None as well
        """Seconds until the deadline, None where the caller set none."""
        return None if self.deadline is None else max(self.deadline - self.loop.time(), 0.0)

    def set_compression(self, compression: grpc.Compression) -> None:
        """See grpc.aio.ServicerContext; what the caller does not accept is not used."""
        if self.started:
            raise RuntimeError("compression is set before the initial metadata is sent, or not at all")
        codec = _CODEC_OF.get(compression)
        accepted = self.headers.get(b"grpc-accept-encoding", b"").replace(b" ", b"").split(b",")
        self._compression = codec if codec in CODECS and codec in accepted else None

    def disable_next_message_compression(self) -> None:
        """See grpc.aio.ServicerContext."""
        self._compress_next = False

    def peer(self) -> str:
        """`ipv4:HOST:PORT`, `ipv6:[HOST]:PORT`, or `unknown`."""
        if not self.scope.get("client"):
            return "unknown"
        host, port = self.scope["client"]
        return f"ipv6:[{host}]:{port}" if ":" in host else f"ipv4:{host}:{port}"

    def peer_identities(self) -> None:
        """None: callers are not identified here."""

    def peer_identity_key(self) -> None:
        """None: callers are not identified here."""

    def auth_context(self) -> dict[str, Any]:
        """Empty: callers are not identified here."""
        return {}

    def add_done_callback(self, callback: Callable[[Any], None]) -> None:
        """See grpc.aio.ServicerContext."""
        self._callbacks = (*self._callbacks, callback)

    def cancelled(self) -> bool:
        """Whether the caller left or its deadline passed."""
        return self.ended_by is not None

    def done(self) -> bool:
        """Whether the call has ended."""
        return self.over or self.ended_by is not None
