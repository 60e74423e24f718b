"""One call on a connection: what is sent on it, and who takes what comes back."""

from __future__ import annotations

from typing import TYPE_CHECKING

from unroll_bench.load import frames
from unroll_bench.load.frames import frame_start

if TYPE_CHECKING:
    from unroll_bench.load.h2 import Connection


def framed(message: bytes) -> bytes:
    """A message as gRPC puts it on a stream: a byte that says it is not compressed, its size, itself."""
    return b"\0" + len(message).to_bytes(4, "big") + message


class Request:
    """A unary call, ready to be sent any number of times: only the stream's number is filled in.

    Args:
        block: The header block (`frames.request_block`).
        message: The serialized message.
    """

    __slots__ = ("block", "framed", "head", "middle", "size")

    def __init__(self, block: bytes, message: bytes) -> None:
        self.block = block
        self.framed = framed(message)
        self.size = len(self.framed)
        self.head = frame_start(len(block), frames.HEADERS, frames.END_HEADERS)
        self.middle = block + frame_start(self.size, frames.DATA, frames.END_STREAM)


class Stream:
    """One call. Subclasses say what to do with what comes; one that has ended can be used for another call."""

    __slots__ = ("closing", "connection", "number", "outbox", "partial", "received", "unsent", "window")

    def __init__(self) -> None:
        self.connection: Connection | None = None
        self.number = 0
        # What follows is the connection's: bytes that the peer still takes, messages for the next write, what the
        # windows did not let through, whether nothing follows that; the beginning of a message whose rest is to
        # come, and bytes received that the peer does not know we have taken.
        self.window = 0
        self.outbox: list[bytes] = []
        self.unsent = memoryview(b"")
        self.closing = False
        self.partial: bytearray | None = None
        self.received = 0

    def message(self, data: bytes, now: float) -> None:
        """Takes one message.

        Args:
            data: It, without gRPC's prefix.
            now: When it was read off the socket, in seconds of `time.perf_counter`.
        """
        raise NotImplementedError

    def ended(self, status: str, now: float) -> None:
        """The call is over. Called once, and last.

        Args:
            status: "OK", or a status's name and message, or what became of the connection.
            now: When that was read off the socket, in seconds of `time.perf_counter`.
        """
        raise NotImplementedError

    def send(self, data: bytes) -> None:
        """Sends a message, or several, that `framed` has made; nothing happens where the call has ended."""
        if self.connection is not None:
            if not self.outbox:
                self.connection.mark(self)
            self.outbox.append(data)

    def half_close(self) -> None:
        """Says that no more messages come."""
        if self.connection is not None and not self.closing:
            self.send(b"")
            self.closing = True
