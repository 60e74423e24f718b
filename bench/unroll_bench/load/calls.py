"""A call on a connection: the messages to send, and the receiver of the answers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from unroll_bench.load import frames
from unroll_bench.load.frames import Headers, frame_start

if TYPE_CHECKING:
    from unroll_bench.load.h2 import Connection


def framed(message: bytes) -> bytes:
    """Returns a message as gRPC sends it: a byte for no compression, the size, the message."""
    return b"\0" + len(message).to_bytes(4, "big") + message


class Request:
    """A unary call, ready to be sent any number of times: only the stream's number is filled in.

    Args:
        headers: The headers (`frames.request_headers`).
        message: The serialized message.
    """

    __slots__ = ("data", "framed", "headers", "size")

    def __init__(self, headers: Headers, message: bytes) -> None:
        self.headers = headers
        self.framed = framed(message)
        self.size = len(self.framed)
        self.data = frame_start(self.size, frames.DATA, frames.END_STREAM)


class Stream:
    """A call. Subclasses handle the answers; an object can be reused after its call has ended."""

    __slots__ = ("closing", "connection", "number", "outbox", "partial", "received", "unsent", "window")

    def __init__(self) -> None:
        self.connection: Connection | None = None
        self.number = 0
        # The connection's fields: bytes that the peer still accepts, messages for the next write, data that the
        # windows held back, True if nothing follows that data; the begin of a message whose rest is to
        # come, and bytes received that are not yet reported to the peer.
        self.window = 0
        self.outbox: list[bytes] = []
        self.unsent = memoryview(b"")
        self.closing = False
        self.partial: bytearray | None = None
        self.received = 0

    def message(self, data: bytes, now: float) -> None:
        """Handles one message.

        Args:
            data: The message, without gRPC's prefix.
            now: Time at which it was read from the socket, in seconds of `time.perf_counter`.
        """
        raise NotImplementedError

    def ended(self, status: str, now: float) -> None:
        """Handles the end of the call; called once, and last.

        Args:
            status: "OK", or a status's name and message, or the fate of the connection.
            now: Time at which that was read from the socket, in seconds of `time.perf_counter`.
        """
        raise NotImplementedError

    def send(self, data: bytes) -> None:
        """Sends one message or several, as made by `framed`; does nothing if the call has ended."""
        if self.connection is not None:
            if not self.outbox:
                self.connection.mark(self)
            self.outbox.append(data)

    def half_close(self) -> None:
        """Half-closes the call: no more messages follow."""
        if self.connection is not None and not self.closing:
            self.send(b"")
            self.closing = True
