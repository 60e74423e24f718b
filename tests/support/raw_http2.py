"""HTTP/2 frame by frame over a socket, for frames that no library would send."""

import socket
import struct
from collections import deque
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import NamedTuple, Self

from hpack import Encoder

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(10)
ACK = END_STREAM = 0x1
END_HEADERS = 0x4
CANCEL = 0x8
ENHANCE_YOUR_CALM = 0xB
HEADER_TABLE_SIZE, MAX_CONCURRENT_STREAMS, INITIAL_WINDOW_SIZE = 1, 3, 4


class Frame(NamedTuple):
    """A received frame."""

    kind: int
    flags: int
    stream: int
    payload: bytes


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """Encodes a frame."""
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def split(data: bytes) -> tuple[list[Frame], bytes]:
    """Splits bytes into complete frames and the rest."""
    found = []
    while len(data) >= 9 and len(data) >= (end := 9 + int.from_bytes(data[:3], "big")):
        found.append(Frame(data[3], data[4], int.from_bytes(data[5:9], "big") & 0x7FFFFFFF, data[9:end]))
        data = data[end:]
    return found, data


def settings(**values: int) -> bytes:
    """Returns a SETTINGS frame; names as in this module, in lower case."""
    pairs = [(globals()[name.upper()], value) for name, value in values.items()]
    return frame(SETTINGS, 0, 0, b"".join(struct.pack(">HI", *pair) for pair in pairs))


def cancellation(stream: int) -> bytes:
    """Returns a frame that cancels a call."""
    return frame(RST_STREAM, 0, stream, struct.pack(">I", CANCEL))


ROOM = 2**30
GREETING = PREFACE + settings(initial_window_size=ROOM) + frame(WINDOW_UPDATE, 0, 0, struct.pack(">I", ROOM))
"""A preface that opens windows of 1 GiB, so that answers never wait for one."""


def header_block(path: str, *more: tuple[str, str], without: str = "") -> bytes:
    """Returns the headers of a gRPC call, without one or with replacements, and without references to earlier ones."""
    usual = [(":method", "POST"), (":scheme", "http"), (":path", path), (":authority", "localhost")]
    usual += [("te", "trailers"), ("content-type", "application/grpc")]
    replaced = {without, *(name for name, _ in more)}
    headers = [*(each for each in usual if each[0] not in replaced), *more]
    # Pseudo-headers come first.
    headers.sort(key=lambda each: not each[0].startswith(":"))
    encoder = Encoder()
    encoder.header_table_size = 0
    block: bytes = encoder.encode(headers, huffman=False)
    return block


def message(body: bytes) -> bytes:
    """Encodes an uncompressed gRPC message."""
    return b"\0" + struct.pack(">I", len(body)) + body


class Connection:
    """A connection that has sent its preface, unless it must not.

    Args:
        address: HOST:PORT.
        greeting: Bytes to send first.
        receive_buffer: Bytes that the kernel buffers for a slow reader; 0 for the default.
    """

    def __init__(self, address: str, greeting: bytes = PREFACE + settings(), receive_buffer: int = 0) -> None:
        host, _, port = address.rpartition(":")
        self.socket = socket.socket()
        if receive_buffer:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.socket.settimeout(30)
        self.socket.connect((host, int(port)))
        self._unread = b""
        self._came: deque[Frame] = deque()
        self._room = self._initial = 65535
        self.send(greeting)

    def send(self, *pieces: bytes) -> bool:
        """Sends as much as the other side accepts; returns False once it accepts no more."""
        try:
            self.socket.sendall(b"".join(pieces))
        except OSError:
            return False
        return True

    def call(self, stream: int, path: str, request: bytes, headers: Sequence[tuple[str, str]] = ()) -> bool:
        """Sends a call with one request within the other side's windows; its own windows do not change."""
        if not self.send(frame(HEADERS, END_HEADERS, stream, header_block(path, *headers))):
            return False
        given, body = 0, message(request)
        while body:
            size = min(len(body), self._initial + given, self._room, 16384)
            if size == 0:
                came = next(self.frames(), None)
                if came is None:
                    return False
                if came.kind == WINDOW_UPDATE and came.stream == stream:
                    given += int.from_bytes(came.payload, "big")
                continue
            piece, body = body[:size], body[size:]
            given, self._room = given - size, self._room - size
            if not self.send(frame(DATA, 0 if body else END_STREAM, stream, piece)):
                return False
        return True

    def frames(self) -> Iterator[Frame]:
        """Yields received frames until the other side closes the connection or is silent for a while."""
        while True:
            while self._came:
                came = self._came.popleft()
                self._react(came)
                yield came
            if not self._receive():
                return

    def _react(self, came: Frame) -> None:
        if came.kind == WINDOW_UPDATE and not came.stream:
            self._room += int.from_bytes(came.payload, "big")
        elif came.kind == SETTINGS and not came.flags & ACK:
            said = dict(struct.iter_unpack(">HI", came.payload))
            self._initial = said.get(INITIAL_WINDOW_SIZE, self._initial)
            self.send(frame(SETTINGS, ACK, 0))
        elif came.kind == PING and not came.flags & ACK:
            self.send(frame(PING, ACK, 0, came.payload))

    def _receive(self) -> bool:
        try:
            piece = self.socket.recv(65536)
        except OSError:
            return False
        found, self._unread = split(self._unread + piece)
        self._came.extend(found)
        return bool(piece)

    def is_alive(self) -> bool:
        """Returns True if the other side answers a ping."""
        if not self.send(frame(PING, 0, 0, b"alive?!?")):
            return False
        return any(each.kind == PING and each.flags & ACK and each.payload == b"alive?!?" for each in self.frames())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.socket.close()
