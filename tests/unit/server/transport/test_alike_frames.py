"""The native transport beside grpcio's, frame by frame: requests cut anywhere, and left at every moment.

Padding is not compared: grpcio's core takes it for a broken frame.
"""

import asyncio
import gzip
import struct
import zlib
from collections.abc import Callable
from functools import partial
from itertools import accumulate, cycle
from typing import NamedTuple
from urllib.parse import unquote

import grpc
import pytest
from hpack import Decoder
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.raw_http2 import (
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    GREETING,
    HEADERS,
    RST_STREAM,
    Connection,
    cancellation,
    frame,
    header_block,
    message,
)
from support.scripted_calls import CODES, PAIRS, Script, Side
from support.waiting import until

INTERNAL, DEADLINE_EXCEEDED = "13", "4"
PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "identity": lambda message: message,
    "gzip": gzip.compress,
    "deflate": zlib.compress,
}


class Sending(NamedTuple):
    """Form in which a request is sent.

    Attributes:
        encoding: Encoding of its messages: "identity", "gzip" or "deflate".
        packed: True for each message that is compressed, in turns.
        headers: Sizes of the frames with headers, in bytes; the last frame has the rest.
        pieces: Sizes of the frames with messages, in bytes, in turns.
        ends_alone: True to end the request with a frame of its own.
    """

    encoding: str
    packed: tuple[bool, ...]
    headers: tuple[int, ...]
    pieces: tuple[int, ...]
    ends_alone: bool

    def header_frames(self, script: Script, *more: tuple[str, str], stream: int = 1) -> list[bytes]:
        """The headers of a call."""
        metadata = (("grpc-encoding", self.encoding), ("script", script.packed()), *more)
        left = header_block(f"/t/{script.method}", *metadata)
        frames = []
        for size in self.headers:
            frames.append((left[:size], 0))
            left = left[size:]
        frames.append((left, END_HEADERS))
        kinds = [HEADERS, *[CONTINUATION] * len(self.headers)]
        return [frame(kind, flags, stream, each) for kind, (each, flags) in zip(kinds, frames, strict=True)]

    def messages(self, script: Script) -> list[bytes]:
        """The messages of a request, as they lie on the wire."""
        parts = []
        for each, is_packed in zip(script.messages, cycle(self.packed), strict=False):
            packed = PACKERS[self.encoding](each)
            parts.append(b"\1" + struct.pack(">I", len(packed)) + packed if is_packed else message(each))
        return parts

    def data_frames(self, data: bytes, ends: bool, stream: int = 1) -> list[bytes]:
        """Part of a request."""
        frames: list[tuple[bytes, int]] = []
        sizes = cycle(self.pieces)
        while data or not frames:
            size = next(sizes)
            frames.append((data[:size], 0))
            data = data[size:]
        if ends and self.ends_alone:
            frames.append((b"", END_STREAM))
        elif ends:
            frames[-1] = (frames[-1][0], END_STREAM)
        return [frame(DATA, flags, stream, each) for each, flags in frames]


SENDINGS = st.builds(
    Sending,
    encoding=st.sampled_from(sorted(PACKERS)),
    packed=st.lists(st.booleans(), min_size=1, max_size=3).map(tuple),
    headers=st.lists(st.integers(0, 60), max_size=3).map(tuple),
    pieces=st.lists(st.sampled_from([1, 2, 3, 5, 7, 100, 1000, 16_000]), min_size=1, max_size=4).map(tuple),
    ends_alone=st.booleans(),
)
PLAIN = Sending("identity", (False,), (), (16_000,), False)
SCRIPTS = st.builds(
    Script,
    method=st.sampled_from(["Unary", "Stream", "Letters", "None"]),
    messages=st.lists(st.binary(max_size=20) | st.integers(0, 9000).map(bytes), min_size=1, max_size=3).map(tuple),
    metadata=st.just(()),
    compression=st.just(grpc.Compression.NoCompression),
    answers=st.integers(0, 3),
    code=st.sampled_from(sorted(CODES)),
    details=st.text(max_size=40),
    trailers=PAIRS,
    end=st.just("status"),
)


class Ending(NamedTuple):
    """The end of a call.

    Attributes:
        headers: Headers and trailers that gRPC defines, and those of the handler.
        body: The messages, as they lie on the wire.
        reset: Number of the error that it was reset with, if it had no status.
    """

    headers: dict[str, str]
    body: bytes
    reset: int | None


def ending_of(connection: Connection, stream: int) -> Ending:
    """Reads the answer to a call."""
    decoder, body = Decoder(), b""
    headers: dict[str, str] = {}
    for came in connection.frames():
        if came.kind == HEADERS:
            decoded = {str(name): str(value) for name, value in decoder.decode(came.payload)}
            headers |= decoded if came.stream == stream else {}
        elif came.kind == DATA and came.stream == stream:
            body += came.payload
        if came.stream == stream and came.kind == RST_STREAM:
            return Ending(_kept(headers), body, int.from_bytes(came.payload, "big"))
        if came.stream == stream and came.flags & END_STREAM and came.kind in (DATA, HEADERS):
            return Ending(_kept(headers), body, None)
    raise AssertionError(f"the call has no end: {headers}")


def _kept(headers: dict[str, str]) -> dict[str, str]:
    """The headers to compare.

    No message is an empty one; escapes and base64 can be written in several ways; each transport has its own words for
    requests that break gRPC's rules.
    """
    known = (":status", "content-type", "grpc-status")
    kept = {name: value.rstrip("=") for name, value in headers.items() if name in known or name.startswith("k")}
    if headers.get("grpc-status") == INTERNAL:
        return kept
    return kept | {"grpc-message": unquote(headers.get("grpc-message", ""))}


def _is_idle(side: Side) -> bool:
    return not side.registry.in_flight


async def ask(side: Side, *pieces: bytes, stream: int = 1) -> Ending:
    """Makes a call on a connection of its own, after others if it is not the first."""

    def speak() -> Ending:
        with Connection(side.address, GREETING) as connection:
            connection.send(*pieces)
            return ending_of(connection, stream)

    return await asyncio.to_thread(speak)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(script=SCRIPTS, sending=SENDINGS)
async def test_requests_in_any_pieces_are_answered_alike(sides: list[Side], script: Script, sending: Sending) -> None:
    pieces = [*sending.header_frames(script), *sending.data_frames(b"".join(sending.messages(script)), ends=True)]
    native, grpcio = [await ask(side, *pieces) for side in sides]
    assert native == grpcio


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(script=SCRIPTS, sending=SENDINGS, share=st.floats(0, 1))
async def test_a_request_that_ends_early_is_answered_alike_or_refused(
    sides: list[Side], script: Script, sending: Sending, share: float
) -> None:
    """If it ends within a message, the native transport refuses it; grpcio's drops the piece or waits for the rest."""
    native, grpcio = sides
    messages = sending.messages(script)
    body = b"".join(messages)
    size = int(share * len(body))
    pieces = [*sending.header_frames(script), *sending.data_frames(body[:size], ends=True)]
    ending = await ask(native, *pieces)
    ends = list(accumulate(map(len, messages), initial=0))
    if script.method == "None" or (size in ends if script.method == "Stream" else size >= ends[1]):
        assert ending == await ask(grpcio, *pieces)
    else:
        assert ending.headers["grpc-status"] == INTERNAL


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(script=SCRIPTS, sending=SENDINGS, share=st.floats(0, 1), ends=st.booleans())
async def test_a_call_can_be_left_at_every_moment(
    sides: list[Side], script: Script, sending: Sending, share: float, ends: bool
) -> None:
    """The handler ends, and the connection carries the next call."""
    waiting = script._replace(end="cancel")
    body = b"".join(sending.messages(waiting))
    left = [*sending.header_frames(waiting), *sending.data_frames(body[: int(share * len(body))], ends)]
    left.append(cancellation(1))
    whole = PLAIN.data_frames(b"".join(PLAIN.messages(script)), ends=True, stream=3)
    outcomes = []
    for side in sides:
        outcomes.append(await ask(side, *left, *PLAIN.header_frames(script, stream=3), *whole, stream=3))
        await until(partial(_is_idle, side))
    assert outcomes[0] == outcomes[1]


MOMENTS = {
    "nothing": (0, False),
    "half a prefix": (3, False),
    "half a message": (7, False),
    "a message": (10, False),
    "a message and half a prefix": (12, False),
    "all but the end": (20, False),
    "all": (20, True),
}


@pytest.mark.parametrize("method", ["Unary", "Stream", "Letters"])
@pytest.mark.parametrize("moment", MOMENTS)
async def test_a_deadline_ends_a_call_alike_at_every_moment(sides: list[Side], method: str, moment: str) -> None:
    size, ends = MOMENTS[moment]
    script = Script(method, (b"12345", b"67890"), (), grpc.Compression.NoCompression, 1, 0, "", (), "deadline")
    headers = PLAIN.header_frames(script, ("grpc-timeout", "200m"))
    outcomes = [
        await ask(side, *headers, *PLAIN.data_frames(b"".join(PLAIN.messages(script))[:size], ends)) for side in sides
    ]
    native, grpcio = [(each.headers.get("grpc-status"), each.body) for each in outcomes]
    assert native == grpcio
    assert native[0] == DEADLINE_EXCEEDED
