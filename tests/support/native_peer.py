"""A client and a native server session without sockets, with a clock that tests set."""

from itertools import pairwise
from typing import Any, NamedTuple

from hpack import Decoder

from support.raw_http2 import (
    DATA,
    END_HEADERS,
    END_STREAM,
    GOAWAY,
    HEADERS,
    PREFACE,
    RST_STREAM,
    Frame,
    frame,
    header_block,
    message,
    settings,
    split,
)
from unroll_server.transport.native import _http2
from unroll_server.transport.native._http2 import Call, Server, Session

UNARY, STREAM, WORK = "/test.Test/Unary", "/test.Test/Stream", "/test.Test/Work"


class Answer(NamedTuple):
    """Answer to a call.

    Attributes:
        headers: Headers and trailers.
        body: The bytes of the messages, with their prefixes.
        reset: Error code of a reset; None if it was not reset.
        ended: True if it has ended.
    """

    headers: dict[str, str]
    body: bytes
    reset: int | None
    ended: bool

    @property
    def status(self) -> tuple[str | None, str | None]:
        """Status and message from the trailers."""
        return self.headers.get("grpc-status"), self.headers.get("grpc-message")


class Peer:
    """The client's end of a session, and its server.

    Args:
        greeting: Bytes to send first.
        age: Seconds after which the connection refuses new calls.
        limits: Limits of the server that differ from the defaults.

    Attributes:
        now: The time, in seconds.
        server: The server, with the methods UNARY, STREAM and WORK.
        session: The connection.
        frames: Frames that the server has sent.
    """

    def __init__(self, greeting: bytes = PREFACE + settings(), age: float = 0.0, **limits: Any) -> None:
        usual: dict[str, Any] = {
            "message_bytes": 2**20,
            "metadata_bytes": 2**14,
            "unfinished_bytes": 2**21,
            "calls": 100,
            "keepalive": 60.0,
            "patience": 20.0,
            "shortest_pings": 5.0,
        }
        self.now = 1000.0
        self.server = Server(**usual | limits)
        self.methods = {
            path: self.server.add_method(path, path == STREAM, 0 if path == WORK else -1)
            for path in (UNARY, STREAM, WORK)
        }
        self.session = Session(self.server, self.now, age)
        self.frames: list[Frame] = []
        self.sent = b""
        self._decoder = Decoder()
        self._headers: dict[int, dict[str, str]] = {}
        self.send(greeting)

    def send(self, *pieces: bytes) -> None:
        """Sends bytes to the server."""
        self.session.receive(b"".join(pieces), self.now)

    def open(
        self, stream: int, path: str = UNARY, *more: tuple[str, str], ends: bool = False, without: str = ""
    ) -> None:
        """Opens a call."""
        flags = END_HEADERS | (END_STREAM if ends else 0)
        self.send(frame(HEADERS, flags, stream, header_block(path, *more, without=without)))

    def write(self, stream: int, data: bytes, ends: bool = False) -> None:
        """Sends bytes of a request in frames of valid sizes; processes the server's frames in between."""
        cuts = [*range(0, len(data), 16384), len(data)]
        for begin, end in pairwise(cuts):
            self.send(frame(DATA, END_STREAM if ends and end == len(data) else 0, stream, data[begin:end]))
            self.receive()

    def call(self, stream: int, body: bytes, path: str = UNARY, *more: tuple[str, str]) -> None:
        """Makes a call with one message."""
        self.open(stream, path, *more)
        self.write(stream, message(body), ends=True)

    def events(self) -> list[tuple[int, Call, bytes]]:
        """Returns the events since the last call."""
        return self.server.take_events()

    def requests(self) -> list[tuple[Call, bytes]]:
        """Returns the calls that have arrived with their message."""
        return [(call, body) for kind, call, body in self.events() if kind == _http2.REQUEST]

    def opened(self) -> Call:
        """Returns the only opened call."""
        ((kind, call, _),) = self.events()
        assert kind == _http2.OPENED
        return call

    def receive(self) -> list[Frame]:
        """Reads the server's frames; returns the new ones."""
        pieces = []
        while piece := self.session.output(2**16):
            pieces.append(piece)
        found, self.sent = split(self.sent + b"".join(pieces))
        for each in found:
            if each.kind == HEADERS:
                named = {str(name): str(value) for name, value in self._decoder.decode(each.payload)}
                self._headers.setdefault(each.stream, {}).update(named)
        self.frames += found
        return found

    def answer(self, stream: int = 1) -> Answer:
        """Returns the server's answer to a call."""
        self.receive()
        of = [each for each in self.frames if each.stream == stream]
        resets = [int.from_bytes(each.payload, "big") for each in of if each.kind == RST_STREAM]
        return Answer(
            self._headers.get(stream, {}),
            b"".join(each.payload for each in of if each.kind == DATA),
            resets[0] if resets else None,
            any(each.flags & END_STREAM for each in of if each.kind in (DATA, HEADERS)),
        )

    def goaways(self) -> list[int]:
        """Returns the error codes of the server's GOAWAY frames."""
        self.receive()
        return [int.from_bytes(each.payload[4:8], "big") for each in self.frames if each.kind == GOAWAY]
