"""gRPC over HTTP/2 on an asyncio socket, at little cost per call: one pass over arrived data, one write per turn.

A load generator has to be faster than the servers that it measures. Processor time a unary call of 4.8 kB and 200 B
back, 64 in flight, against a server that answers bytes made beforehand: this 10 to 17 us, grpc.aio 100 to 127 us,
pyqwest 0.12 (Rust) 210 to 255 us. Measured on a machine that others used, too; the best runs of many made 63,000 calls
a second, and 140,000 messages a second on streams.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from time import perf_counter

from unroll_bench.load import frames
from unroll_bench.load.calls import Request, Stream
from unroll_bench.load.frames import OK, Headers, frame, frame_start
from unroll_bench.load.receiving import Receiver

# Bytes after which data is written at once, so that a server works on the first calls while the next are made.
_WRITE_AT = 1 << 15


class Connection(Receiver):
    """One connection to a gRPC server; `connect` makes it.

    Args:
        on_unusable: Called once when no more calls can be started: the connection broke, the peer said GOAWAY, or
            the stream numbers are used up. Calls in flight continue if possible.

    Attributes:
        usable: True if calls can be started.
        reason: Reason why no calls can be started.
    """

    def __init__(self, on_unusable: "Callable[[Connection], None]") -> None:
        super().__init__()
        self.usable = False
        self.reason = ""
        self._on_unusable = on_unusable
        self._loop = asyncio.get_running_loop()
        self._ready: asyncio.Future[None] = self._loop.create_future()
        self._lost: asyncio.Future[None] = self._loop.create_future()
        self._transport: asyncio.Transport | None = None
        self._next = 1
        self._out: list[bytes | memoryview] = []
        self._out_size = 0
        self._marked: list[Stream] = []
        self._blocked: dict[int, Stream] = {}
        self._waiting: deque[tuple[Stream, Request | Headers]] = deque()
        self._sent_blocks = frames.SentBlocks()
        self._flushing = False  # or about to
        # Limits of the peer.
        self._window = frames.DEFAULT_WINDOW
        self._stream_window = frames.DEFAULT_WINDOW
        self._frame_size = frames.DEFAULT_FRAME_SIZE
        self._max_streams = frames.LAST_STREAM

    def call(self, stream: Stream, request: Request) -> None:
        """Starts a unary call; it waits while the peer allows no more streams."""
        if len(self._streams) >= self._max_streams:
            self._waiting.append((stream, request))
            return
        number = self._begin(stream)
        size = request.size
        if size <= self._frame_size and size <= self._window and size <= self._stream_window:
            self._window -= size
            stream.closing = True
            tag = number.to_bytes(4, "big")
            block = self._sent_blocks.block(request.headers)
            self._out += (
                frame_start(len(block), frames.HEADERS, frames.END_HEADERS),
                tag,
                block,
                request.data,
                tag,
                request.framed,
            )
            self._out_size += size
            if self._out_size >= _WRITE_AT:
                self.flush()
            elif not self._flushing:
                self._flush_soon()
        else:
            self._open(number, request.headers)
            stream.send(request.framed)
            stream.half_close()

    def open(self, stream: Stream, headers: Headers) -> None:
        """Starts a call that streams both ways; it waits while the peer allows no more streams."""
        if len(self._streams) >= self._max_streams:
            stream.connection = self  # so that messages sent meanwhile wait, too
            self._waiting.append((stream, headers))
            return
        self._open(self._begin(stream), headers)
        if stream.outbox:
            self._marked.append(stream)
        self._flush_soon()

    def mark(self, stream: Stream) -> None:
        """Records that a stream has messages in its outbox."""
        self._marked.append(stream)
        if not self._flushing:
            self._flush_soon()

    def flush(self) -> None:
        """Writes the collected data; messages of one stream and turn share as few frames as possible."""
        self._flushing = False
        if self._marked:
            marked, self._marked = self._marked, []
            for stream in marked:
                # It may have ended, or not be admitted yet.
                if stream.outbox and stream.number:
                    data = b"".join((stream.unsent, *stream.outbox))
                    stream.outbox.clear()
                    stream.unsent = memoryview(data)
                    self._pump(stream)
        if self._out and self._transport is not None:
            self._transport.write(b"".join(self._out))
            self._out.clear()
            self._out_size = 0

    async def close(self) -> None:
        """Ends the connection; calls in flight end with CANCELLED."""
        if self._transport is not None and not self._lost.done():
            self._fail("CANCELLED: the connection was closed")
            self._transport.write(frame(frames.GOAWAY, 0, 0, bytes(8)))
            # A peer that does not read must not block the end.
            self._transport.abort() if self._transport.get_write_buffer_size() else self._transport.close()
            await self._lost

    async def ready(self) -> None:
        """Waits for the peer's settings.

        Raises:
            ConnectionError: it does not speak HTTP/2, or closed the connection.
        """
        await self._ready

    @property
    def was_used(self) -> bool:
        """True if a call was started."""
        return self._next > 1

    # Callbacks of asyncio.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio.Protocol; sends the client's preface."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.write(frames.opening())

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio.Protocol; ends every remaining call."""
        self._fail(f"UNAVAILABLE: connection lost{f' ({exc})' if exc else ''}")
        self._lost.set_result(None)

    # Frames of the peer.

    def _settings(self, payload: bytes) -> None:
        for name, value in frames.SETTING.iter_unpack(payload[: len(payload) // 6 * 6]):
            if name == frames.HEADER_TABLE_SIZE:
                self._sent_blocks.resize(value)
            elif name == frames.MAX_CONCURRENT_STREAMS:
                self._max_streams = value
            elif name == frames.INITIAL_WINDOW_SIZE:
                for stream in self._streams.values():
                    stream.window += value - self._stream_window
                self._stream_window = value
            elif name == frames.MAX_FRAME_SIZE:
                self._frame_size = value
        self._out.append(frame(frames.SETTINGS, frames.ACK, 0))
        if not self._ready.done():
            self.usable = True
            self._ready.set_result(None)
        self._unblock()
        self._admit()

    def _widen(self, number: int, size: int) -> None:
        if number == 0:
            self._window += size
            self._unblock()
        elif (stream := self._streams.get(number)) is not None:
            stream.window += size
            if self._blocked.pop(number, None) is not None:
                self._pump(stream)

    def _goaway(self, payload: bytes, now: float) -> None:
        last = int.from_bytes(payload[:4], "big") & frames.LAST_STREAM
        words = [frames.error_name(int.from_bytes(payload[4:8], "big")), payload[8:64].decode("ascii", "replace")]
        reason = f"GOAWAY: {' '.join(filter(None, words))}"
        self._unusable(reason)
        for stream in [stream for number, stream in self._streams.items() if number > last]:
            self._end(stream, reason, frames.END_STREAM, now, reset=True)

    def _pinged(self, payload: bytes) -> None:
        self._out.append(frame(frames.PING, frames.ACK, 0, payload))
        self._flush_soon()

    def _pass_done(self) -> None:
        self.flush()
        if not self.usable and not self._streams and self._transport is not None and self._ready.done():
            self._transport.close()

    def _broken(self, reason: str) -> None:
        self._fail(reason)
        if self._transport is not None:
            self._transport.abort()

    def _give_back(self, number: int, size: int) -> None:
        self._out.append(frame(frames.WINDOW_UPDATE, 0, number, size.to_bytes(4, "big")))

    # Starting and ending calls.

    def _open(self, number: int, headers: Headers) -> None:
        self._out.append(frame(frames.HEADERS, frames.END_HEADERS, number, self._sent_blocks.block(headers)))

    def _begin(self, stream: Stream) -> int:
        number = self._next
        self._next = number + 2
        if number + 2 > frames.LAST_STREAM:
            self._unusable("the stream numbers are used up")
        stream.connection = self
        stream.number = number
        stream.window = self._stream_window
        stream.received = 0
        self._streams[number] = stream
        return number

    def _end(self, stream: Stream, status: str, flags: int, now: float, *, reset: bool = False) -> None:
        number = stream.number
        if not reset and (not stream.closing or stream.unsent or stream.outbox or not flags & frames.END_STREAM):
            self._out.append(frame(frames.RST_STREAM, 0, number, frames.CANCEL.to_bytes(4, "big")))
        if stream.partial is not None:
            stream.partial = None
            status = "INTERNAL: the call ended within a message" if status is OK else status
        if stream.unsent:
            stream.unsent = memoryview(b"")
            self._blocked.pop(number, None)
        stream.outbox.clear()
        stream.connection = None
        stream.closing = False
        stream.number = 0
        del self._streams[number]
        if self._waiting:
            self._admit()
        stream.ended(status, now)

    def _admit(self) -> None:
        while self._waiting and self.usable and len(self._streams) < self._max_streams:
            stream, what = self._waiting.popleft()
            if isinstance(what, Request):
                self.call(stream, what)
            else:
                self.open(stream, what)

    def _unusable(self, reason: str) -> None:
        if not self.reason:
            self.usable = False
            self.reason = reason
            now = perf_counter()
            waiting, self._waiting = self._waiting, deque()
            self._on_unusable(self)
            for stream, _ in waiting:
                stream.outbox.clear()
                stream.connection = None
                stream.ended(reason, now)

    def _fail(self, reason: str) -> None:
        self._unusable(reason)
        if not self._ready.done():
            self._ready.set_exception(ConnectionError(reason))
        now = perf_counter()
        for stream in list(self._streams.values()):
            self._end(stream, reason, frames.END_STREAM, now, reset=True)

    # Sending.

    def _flush_soon(self) -> None:
        if not self._flushing:
            self._flushing = True
            self._loop.call_soon(self.flush)

    def _pump(self, stream: Stream) -> None:
        data, size = stream.unsent, len(stream.unsent)
        tag = stream.number.to_bytes(4, "big")
        at = 0
        while at < size:
            part = min(size - at, self._frame_size, stream.window, self._window)
            if part <= 0:
                self._blocked[stream.number] = stream
                break
            last = stream.closing and at + part == size
            self._out += (frame_start(part, frames.DATA, frames.END_STREAM * last), tag, data[at : at + part])
            at += part
            stream.window -= part
            self._window -= part
        if not size and stream.closing:
            self._out += (frame_start(0, frames.DATA, frames.END_STREAM), tag)
        stream.unsent = data[at:]

    def _unblock(self) -> None:
        for number in list(self._blocked):
            if self._window <= 0:
                break
            self._pump(self._blocked.pop(number))
