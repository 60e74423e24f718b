"""The generator's HTTP/2 against grpcio's servers, and against a peer with rare behaviour."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
import pytest
from hpack import Decoder, Encoder, NeverIndexedHeaderTuple
from hypothesis import given
from hypothesis import strategies as st

from unroll_bench.load import frames
from unroll_bench.load.calls import Request, Stream, framed
from unroll_bench.load.connecting import connect, split_address
from unroll_bench.load.frames import Headers, frame, request_headers
from unroll_bench.load.h2 import Connection

PATH = "/test.Echo/"
MEGABYTE = bytes(range(256)) * 4096


class Caught(Stream):
    """A call that keeps everything received."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[bytes] = []
        self.done: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    def message(self, data: bytes, now: float) -> None:
        self.messages.append(data)

    def ended(self, status: str, now: float) -> None:
        self.done.set_result(status)


async def echo(request: bytes, context: Any) -> bytes:
    return request


async def refuse(request: bytes, context: Any) -> bytes:
    await context.abort(grpc.StatusCode.NOT_FOUND, "no such thing: 100 % gone\nüber")
    raise AssertionError


async def echo_all(requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
    async for request in requests:
        yield request


@pytest.fixture
async def address() -> AsyncIterator[str]:
    """A grpcio server in this process."""
    server = grpc.aio.server(options=[("grpc.max_receive_message_length", -1)])
    handlers: dict[str, Any] = {
        "Echo": grpc.unary_unary_rpc_method_handler(echo),
        "Refuse": grpc.unary_unary_rpc_method_handler(refuse),
        "All": grpc.stream_stream_rpc_method_handler(echo_all),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Echo", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield f"127.0.0.1:{port}"
    await server.stop(None)


def asked(method: str, *metadata: tuple[str, str]) -> Headers:
    return request_headers(PATH + method, "test", "http", metadata)


async def call(
    connection: Connection, method: str, message: bytes, *metadata: tuple[str, str]
) -> tuple[str, list[bytes]]:
    stream = Caught()
    connection.call(stream, Request(asked(method, *metadata), message))
    return await stream.done, stream.messages


@pytest.mark.parametrize("message", [b"", b"x", b"y" * 16_379, b"z" * 16_380, MEGABYTE, MEGABYTE * 5])
async def test_unary_of_any_size(address: str, message: bytes) -> None:
    connection = await connect(address, lambda line: None)
    for _ in range(3):
        assert await call(connection, "Echo", message) == ("OK", [message])
    await connection.close()


async def test_many_large_messages_at_once(address: str) -> None:
    """Messages that share the connection's window all arrive."""
    connection = await connect(address, lambda line: None)
    answers = await asyncio.gather(*(call(connection, "Echo", MEGABYTE + bytes([index])) for index in range(20)))
    assert answers == [("OK", [MEGABYTE + bytes([index])]) for index in range(20)]
    await connection.close()


async def test_status_and_message(address: str) -> None:
    connection = await connect(address, lambda line: None)
    assert await call(connection, "Refuse", b"") == ("NOT_FOUND: no such thing: 100 % gone über", [])
    status, _ = await call(connection, "Missing", b"")
    assert status.startswith("UNIMPLEMENTED")
    assert await call(connection, "Echo", b"still there") == ("OK", [b"still there"])
    await connection.close()


async def test_stream_both_ways(address: str) -> None:
    connection = await connect(address, lambda line: None)
    stream = Caught()
    connection.open(stream, asked("All"))
    sent = [bytes([index]) * (index * 97) for index in range(256)] + [MEGABYTE]
    for message in sent:
        stream.send(framed(message))
    stream.half_close()
    assert await stream.done == "OK"
    assert stream.messages == sent
    await connection.close()


async def test_close_ends_calls(address: str) -> None:
    connection = await connect(address, lambda line: None)
    stream = Caught()
    connection.open(stream, asked("All"))
    await connection.close()
    assert (await stream.done).startswith("CANCELLED")
    assert not connection.usable


async def test_connection_age(address: str) -> None:
    """A server that asks for a new connection still answers calls in flight."""
    server = grpc.aio.server(options=[("grpc.max_connection_age_ms", 50)])
    released = asyncio.Event()

    async def wait(request: bytes, context: Any) -> bytes:
        await released.wait()
        return request

    handlers: dict[str, Any] = {"Wait": grpc.unary_unary_rpc_method_handler(wait)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Echo", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    unusable: asyncio.Future[Connection] = asyncio.get_running_loop().create_future()
    connection = await connect(f"127.0.0.1:{port}", unusable.set_result)
    running = asyncio.ensure_future(call(connection, "Wait", b"kept"))
    assert await unusable is connection
    assert connection.reason.startswith("GOAWAY: NO_ERROR")
    released.set()
    assert await running == ("OK", [b"kept"])
    await connection.close()
    await server.stop(None)


async def test_no_server() -> None:
    with pytest.raises(ConnectionRefusedError):
        await connect("127.0.0.1:1", lambda line: None)


@pytest.mark.parametrize("address", ["", "host", "host:", ":1", "host:70000", "host:http"])
def test_bad_addresses(address: str) -> None:
    with pytest.raises(ValueError, match="HOST:PORT"):
        split_address(address)


def test_addresses() -> None:
    assert split_address("a.b:1") == ("a.b", 1)
    assert split_address("[::1]:50051") == ("::1", 50051)


# A peer of which the test controls every byte.


def headers(*pairs: tuple[str, str]) -> bytes:
    return Encoder().encode([NeverIndexedHeaderTuple(name, value) for name, value in pairs])


BEGIN = headers((":status", "200"), ("content-type", "application/grpc"))
END = headers(("grpc-status", "0"))


class Peer:
    """One accepted connection, read frame by frame."""

    def __init__(self, settings: bytes = b"") -> None:
        self._settings = settings
        self._accepted: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def __aenter__(self) -> "Peer":
        async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            self.reader, self.writer = reader, writer
            await reader.readexactly(len(frames.PREFACE))
            writer.write(frame(frames.SETTINGS, 0, 0, self._settings))
            self._accepted.set_result(None)

        self._server = await asyncio.start_server(accept, "127.0.0.1", 0)
        self.lost: asyncio.Future[Connection] = asyncio.get_running_loop().create_future()
        self.connection = await connect(f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}", self.lost.set_result)
        await self._accepted
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.connection.close()
        self.writer.close()
        self._server.close()

    async def next(self, *kinds: int) -> tuple[int, int, int, bytes]:
        """Returns the next frame of one of these kinds: kind, flags, stream, payload."""
        while True:
            high, low, kind, flags, number = frames.FRAME_HEADER.unpack(await self.reader.readexactly(9))
            payload = await self.reader.readexactly(high << 16 | low)
            if kind in kinds:
                return kind, flags, number, payload

    def answer(self, number: int, message: bytes) -> None:
        self.writer.write(frame(frames.HEADERS, frames.END_HEADERS, number, BEGIN))
        self.writer.write(frame(frames.DATA, 0, number, framed(message)))
        self.writer.write(frame(frames.HEADERS, frames.END_HEADERS | frames.END_STREAM, number, END))


def start(peer: Peer, message: bytes = b"m") -> Caught:
    stream = Caught()
    peer.connection.call(stream, Request(asked("Echo"), message))
    return stream


async def test_ping_and_settings_are_acknowledged() -> None:
    async with Peer() as peer:
        assert (await peer.next(frames.SETTINGS))[1] == 0
        assert (await peer.next(frames.SETTINGS))[1] == frames.ACK
        peer.writer.write(frame(frames.PING, 0, 0, b"12345678"))
        assert await peer.next(frames.PING) == (frames.PING, frames.ACK, 0, b"12345678")


async def test_no_more_streams_than_allowed() -> None:
    async with Peer(frames.SETTING.pack(frames.MAX_CONCURRENT_STREAMS, 2)) as peer:
        streams = [start(peer) for _ in range(5)]
        for expected in (1, 3):
            assert (await peer.next(frames.HEADERS))[2] == expected
        peer.writer.write(frame(frames.PING, 0, 0, bytes(8)))
        # A third call would come before the answer to the ping.
        assert (await peer.next(frames.HEADERS, frames.PING))[0] == frames.PING
        for number in (1, 3, 5, 7, 9):
            peer.answer(number, b"a")
        assert [await stream.done for stream in streams] == ["OK"] * 5


async def test_waiting_stream_keeps_what_was_sent() -> None:
    async with Peer(frames.SETTING.pack(frames.MAX_CONCURRENT_STREAMS, 1)) as peer:
        first = start(peer)
        second = Caught()
        peer.connection.open(second, asked("All"))
        second.send(framed(b"early"))
        await peer.next(frames.HEADERS)
        await peer.next(frames.DATA)
        peer.answer(1, b"a")
        assert await first.done == "OK"
        assert (await peer.next(frames.HEADERS))[2] == 3
        assert (await peer.next(frames.DATA))[2:] == (3, framed(b"early"))


async def test_windows_are_kept() -> None:
    """The client never exceeds the peer's windows, even if they change."""
    async with Peer(frames.SETTING.pack(frames.INITIAL_WINDOW_SIZE, 10)) as peer:
        start(peer, b"0123456789")  # 15 bytes with the prefix
        assert (await peer.next(frames.DATA))[3] == framed(b"0123456789")[:10]
        peer.writer.write(frame(frames.PING, 0, 0, bytes(8)))
        assert (await peer.next(frames.DATA, frames.PING))[0] == frames.PING
        peer.writer.write(frame(frames.WINDOW_UPDATE, 0, 1, (2).to_bytes(4, "big")))
        assert (await peer.next(frames.DATA))[1:] == (0, 1, b"56")
        peer.writer.write(frame(frames.SETTINGS, 0, 0, frames.SETTING.pack(frames.INITIAL_WINDOW_SIZE, 100)))
        assert (await peer.next(frames.DATA))[1:] == (frames.END_STREAM, 1, b"789")
        used = 15
        big = start(peer, bytes(100_000))
        peer.writer.write(frame(frames.WINDOW_UPDATE, 0, 3, (1 << 20).to_bytes(4, "big")))
        received = b""
        while len(received) < frames.DEFAULT_WINDOW - used:
            part = (await peer.next(frames.DATA))[3]
            assert len(part) <= frames.DEFAULT_FRAME_SIZE
            received += part
        assert len(received) == frames.DEFAULT_WINDOW - used
        peer.writer.write(frame(frames.WINDOW_UPDATE, 0, 0, (1 << 20).to_bytes(4, "big")))
        while len(received) < 100_005:
            received += (await peer.next(frames.DATA))[3]
        assert received == framed(bytes(100_000))
        peer.answer(3, b"")
        assert await big.done == "OK"


async def test_reset_and_goaway_are_reported() -> None:
    async with Peer() as peer:
        streams = [start(peer) for _ in range(3)]
        await peer.next(frames.DATA)
        peer.writer.write(frame(frames.RST_STREAM, 0, 1, (7).to_bytes(4, "big")))
        assert await streams[0].done == "RST_STREAM: REFUSED_STREAM"
        peer.writer.write(
            frame(frames.GOAWAY, 0, 0, (3).to_bytes(4, "big") + (11).to_bytes(4, "big") + b"too many pings")
        )
        assert await peer.lost is peer.connection
        assert await streams[2].done == "GOAWAY: ENHANCE_YOUR_CALM too many pings"
        peer.answer(3, b"a")
        assert await streams[1].done == "OK"


async def test_lost_connection_ends_calls() -> None:
    async with Peer() as peer:
        stream = start(peer)
        await peer.next(frames.DATA)
        peer.writer.transport.abort()
        assert (await stream.done).startswith("UNAVAILABLE: connection lost")
        assert peer.lost.done()


@pytest.mark.parametrize(
    "sent",
    [
        frame(frames.DATA, 0, 1, b"\1\0\0\0\0"),
        frame(frames.HEADERS, frames.END_HEADERS, 1, b"\xff\xff\xff\xff"),
        frame(frames.HEADERS, frames.END_HEADERS, 1, b"\xbe"),
        frame(frames.DATA, frames.PADDED, 1, b"\x09abc"),
        frames.FRAME_HEADER.pack(255, 0, frames.DATA, 0, 1),
    ],
    ids=["compressed", "no header block", "an entry of the table we refused", "too much padding", "too large"],
)
async def test_nonsense_ends_the_connection(sent: bytes) -> None:
    async with Peer() as peer:
        stream = start(peer)
        await peer.next(frames.DATA)
        peer.writer.write(sent)
        assert (await stream.done).startswith("ProtocolError: ")
        assert not peer.connection.usable


async def test_not_a_grpc_server() -> None:
    async with Peer() as peer:
        stream = start(peer)
        await peer.next(frames.DATA)
        flags = frames.END_HEADERS | frames.END_STREAM
        peer.writer.write(frame(frames.HEADERS, flags, 1, headers((":status", "502"), ("content-type", "text/html"))))
        assert await stream.done == "UNAVAILABLE: HTTP status 502"


async def test_early_status_resets_the_call() -> None:
    """A call that the server has answered early is still half-closed."""
    async with Peer() as peer:
        stream = Caught()
        peer.connection.open(stream, asked("All"))
        await peer.next(frames.HEADERS)
        peer.answer(1, b"a")
        assert await stream.done == "OK"
        assert await peer.next(frames.RST_STREAM) == (frames.RST_STREAM, 0, 1, frames.CANCEL.to_bytes(4, "big"))


class Wire(asyncio.Transport):
    """Records what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.written += data


@given(
    messages=st.lists(st.binary(max_size=400), max_size=8),
    cuts=st.lists(st.integers(1, 300), min_size=1),
    reads=st.lists(st.integers(1, 300), min_size=1),
    padding=st.none() | st.integers(0, 30),
    parts=st.integers(1, 4),
)
def test_any_cut_gives_the_same(
    messages: list[bytes], cuts: list[int], reads: list[int], padding: int | None, parts: int
) -> None:
    """Messages are independent of their cuts into frames and reads, and of padding."""

    async def run() -> None:
        data = b"".join(map(framed, messages))
        sent = frame(frames.SETTINGS, 0, 0) + frame(frames.HEADERS, 0, 1, BEGIN[:1])
        sent += frame(frames.CONTINUATION, frames.END_HEADERS, 1, BEGIN[1:])
        at = turn = 0
        while at < len(data):
            part = data[at : at + cuts[turn % len(cuts)]]
            if padding is not None:
                part = bytes([padding]) + part + bytes(padding)
            sent += frame(frames.DATA, 0 if padding is None else frames.PADDED, 1, part)
            at += cuts[turn % len(cuts)]
            turn += 1
        size = -(-len(END) // parts)
        pieces = [END[at : at + size] for at in range(0, len(END), size)]
        flags = frames.END_STREAM | (frames.END_HEADERS if len(pieces) == 1 else 0)
        sent += frame(frames.HEADERS, flags, 1, pieces[0])
        for index, piece in enumerate(pieces[1:], 2):
            sent += frame(frames.CONTINUATION, frames.END_HEADERS * (index == len(pieces)), 1, piece)
        connection = Connection(lambda line: None)
        connection.connection_made(Wire())
        stream = Caught()
        connection.open(stream, asked("All"))
        at = turn = 0
        while at < len(sent):
            read = sent[at : at + reads[turn % len(reads)]]
            connection.get_buffer(-1)[: len(read)] = read
            connection.buffer_updated(len(read))
            at += len(read)
            turn += 1
        assert stream.messages == messages
        assert stream.done.result() == "OK"

    asyncio.run(run())


@given(st.data())
def test_header_blocks_mean_their_headers_and_repeated_ones_are_indexes(data: st.DataObject) -> None:
    blocks, decoder = frames.SentBlocks(), Decoder()
    known = [asked(method, ("token", token)) for method in ("Echo", "All") for token in ("a", "b" * 40)]
    room = 4096
    for headers in data.draw(st.lists(st.sampled_from(known), max_size=12)):
        if data.draw(st.integers(0, 5)) == 0:
            room = data.draw(st.sampled_from((0, 60, 300, 4096, 65536)))
            blocks.resize(room)
        for _ in range(3):
            block = blocks.block(headers)
            assert [(str(name), str(value)) for name, value in decoder.decode(block)] == [*headers]
        if room >= 4096:
            assert len(block) == len(headers)
