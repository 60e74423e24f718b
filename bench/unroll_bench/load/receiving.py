"""The receiving half of an HTTP/2 connection: one pass over the arrived data."""

import asyncio
from time import perf_counter

from unroll_bench.load import frames
from unroll_bench.load.calls import Stream
from unroll_bench.load.frames import FRAME_HEADER, PREFIX, ProtocolError

_BUFFER = 1 << 18
_PLAIN = frames.END_HEADERS | frames.PADDED | frames.PRIORITY
_NO_STATUS = "INTERNAL: the call ended without a status"


class Receiver(asyncio.BufferedProtocol):
    """Parses frames and passes their content on; `Connection` is the rest."""

    def __init__(self) -> None:
        self._streams: dict[int, Stream] = {}
        self._buffer = bytearray(_BUFFER)
        self._view = memoryview(self._buffer)
        self._filled = 0
        self._blocks = frames.Blocks()
        self._headers: tuple[int, int, bytes] | None = None  # flags, stream, block, until CONTINUATION ends it
        self._received = 0  # bytes received that are not yet reported to the peer

    def get_buffer(self, sizehint: int) -> memoryview:
        """See asyncio.BufferedProtocol; returns the room for the next bytes."""
        return self._view[self._filled :]

    def buffer_updated(self, count: int) -> None:
        """See asyncio.BufferedProtocol; reads every complete frame, then writes the answers."""
        now = perf_counter()
        end = self._filled + count
        try:
            at = self._read(end, now)
        except Exception as error:
            # Any error, also of a message's handler: the run must report it and end its calls.
            self._broken(f"{type(error).__name__}: {error}")
            return
        if at < end:
            self._buffer[: end - at] = self._buffer[at:end]
        self._filled = end - at
        if self._received >= frames.RECEIVE_WINDOW >> 1:
            self._give_back(0, self._received)
            self._received = 0
        self._pass_done()

    def _read(self, end: int, now: float) -> int:
        # The hot loop: names are local and the common cases inline.
        buffer, view, streams, outcome_of = self._buffer, self._view, self._streams, self._blocks.outcome
        unpack = FRAME_HEADER.unpack_from
        at = 0
        while end - at >= 9:
            high, low, kind, flags, number = unpack(buffer, at)
            size = high << 16 | low
            body = at + 9
            at = body + size
            if at > end:
                if size > frames.DEFAULT_FRAME_SIZE:
                    raise ProtocolError(f"a frame of {size} bytes")
                return body - 9
            if kind == frames.DATA:
                self._received += size
                stream = streams.get(number)
                if stream is not None:
                    stream.received += size
                    stop = at
                    if flags & frames.PADDED:
                        body, stop = self._unpadded(body, stop, flags)
                    if stop > body:
                        self._messages(stream, body, stop, now)
                    if flags & frames.END_STREAM:
                        self._end(stream, _NO_STATUS, flags, now)
                    elif stream.received >= frames.RECEIVE_WINDOW >> 1:
                        self._give_back(number, stream.received)
                        stream.received = 0
            elif kind == frames.HEADERS and flags & _PLAIN == frames.END_HEADERS:
                outcome = outcome_of(bytes(view[body:at]))
                if outcome is not None or flags & frames.END_STREAM:
                    stream = streams.get(number)
                    if stream is not None:
                        self._end(stream, outcome or _NO_STATUS, flags, now)
            else:
                self._control(kind, flags, number, body, at, now)
        return at

    def _messages(self, stream: Stream, body: int, stop: int, now: float) -> None:
        # A frame can hold a part of a message, or several.
        source, view, at, end = self._buffer, self._view, body, stop
        if stream.partial is not None:
            stream.partial += view[body:stop]
            source = stream.partial
            if len(source) < 5 or len(source) - 5 < PREFIX.unpack_from(source)[1]:
                return
            view, at, end = memoryview(source), 0, len(source)
            stream.partial = None
        unpack = PREFIX.unpack_from
        while end - at >= 5:
            compressed, size = unpack(source, at)
            if compressed:
                raise ProtocolError("a compressed message, which was not asked for")
            next_at = at + 5 + size
            if next_at > end:
                break
            stream.message(bytes(view[at + 5 : next_at]), now)
            at = next_at
        if at < end:
            stream.partial = bytearray(view[at:end])

    def _control(self, kind: int, flags: int, number: int, body: int, stop: int, now: float) -> None:
        payload = bytes(self._view[body:stop])
        if kind == frames.HEADERS:
            body, stop = self._unpadded(body, stop, flags)
            self._headers = (flags, number, bytes(self._view[body + 5 * bool(flags & frames.PRIORITY) : stop]))
            self._headers_done(flags, now)
        elif kind == frames.CONTINUATION and self._headers is not None and self._headers[1] == number:
            first, _, block = self._headers
            self._headers = (first, number, block + payload)
            self._headers_done(flags, now)
        elif kind == frames.WINDOW_UPDATE and len(payload) == 4:
            self._widen(number, int.from_bytes(payload, "big"))
        elif kind == frames.SETTINGS and not flags & frames.ACK:
            self._settings(payload)
        elif kind == frames.PING and not flags & frames.ACK:
            self._pinged(payload)
        elif kind == frames.RST_STREAM and len(payload) == 4:
            if number in self._streams:
                name = frames.error_name(int.from_bytes(payload, "big"))
                self._end(self._streams[number], f"RST_STREAM: {name}", frames.END_STREAM, now, reset=True)
        elif kind == frames.GOAWAY and len(payload) >= 8:
            self._goaway(payload, now)

    def _headers_done(self, flags: int, now: float) -> None:
        if self._headers is None or not flags & frames.END_HEADERS:
            return
        first, number, block = self._headers
        self._headers = None
        outcome = self._blocks.outcome(block)
        if number in self._streams and (outcome is not None or first & frames.END_STREAM):
            self._end(self._streams[number], outcome or _NO_STATUS, first, now)

    def _unpadded(self, body: int, stop: int, flags: int) -> tuple[int, int]:
        if not flags & frames.PADDED:
            return body, stop
        padding = self._buffer[body] if stop > body else 0
        if stop - body < 1 + padding:
            raise ProtocolError("padding longer than its frame")
        return body + 1, stop - padding

    # Implemented by `Connection`.

    def _end(self, stream: Stream, status: str, flags: int, now: float, *, reset: bool = False) -> None:
        raise NotImplementedError

    def _settings(self, payload: bytes) -> None:
        raise NotImplementedError

    def _widen(self, number: int, size: int) -> None:
        raise NotImplementedError

    def _pinged(self, payload: bytes) -> None:
        raise NotImplementedError

    def _goaway(self, payload: bytes, now: float) -> None:
        raise NotImplementedError

    def _give_back(self, number: int, size: int) -> None:
        raise NotImplementedError

    def _pass_done(self) -> None:
        raise NotImplementedError

    def _broken(self, reason: str) -> None:
        raise NotImplementedError
