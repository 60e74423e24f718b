"""The native transport's sessions, frame by frame: events, answers, refusals."""

import base64
import gzip
import struct
import zlib
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from support.raw_http2 import (
    ACK,
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    ENHANCE_YOUR_CALM,
    HEADERS,
    INITIAL_WINDOW_SIZE,
    PING,
    PREFACE,
    PRIORITY,
    SETTINGS,
    WINDOW_UPDATE,
    cancellation,
    frame,
    header_block,
    message,
    settings,
)

_http2 = pytest.importorskip("unroll_server.transport.native._http2", reason="the native transport is not compiled")
from support.native_peer import STREAM, UNARY, WORK, Peer  # noqa: E402  # needs it

OK, CANCELLED, DEADLINE_EXCEEDED, RESOURCE_EXHAUSTED, UNIMPLEMENTED, INTERNAL = "0", 1, "4", "8", "12", "13"
NO_ERROR = 0


def test_a_call_is_handed_over_with_its_message_and_answered() -> None:
    peer = Peer()
    peer.call(1, b"question", UNARY, ("grpc-timeout", "250m"), ("name", "value"), ("name", "again"))
    ((call, body),) = peer.requests()
    assert (call.path, call.method, body) == (UNARY, peer.methods[UNARY], b"question")
    assert call.deadline == pytest.approx(1000.25)
    assert call.metadata == [("name", "value"), ("name", "again")]
    peer.server.respond([(call, b"answer", ())])
    answer = peer.answer()
    assert answer.headers[":status"] == "200"
    assert answer.headers["content-type"] == "application/grpc"
    assert answer.headers["grpc-accept-encoding"] == "identity, deflate, gzip"
    assert answer.body == message(b"answer")
    assert answer.status == (OK, None)
    assert answer.ended
    assert answer.reset is None
    assert not peer.events()
    assert not peer.session.over


@pytest.mark.parametrize("size", [1, 3, 7, 100])
def test_bytes_may_come_in_any_pieces(size: int) -> None:
    peer = Peer(b"")
    body = bytes(range(256))
    data = PREFACE + settings() + frame(HEADERS, END_HEADERS, 1, header_block(UNARY))
    data += b"".join(frame(DATA, 0, 1, message(body)[at : at + 50]) for at in range(0, 300, 50))
    for at in range(0, len(data), size):
        peer.send(data[at : at + size])
    assert [found for _, found in peer.requests()] == [body]


def test_binary_metadata_and_details_are_encoded() -> None:
    peer = Peer()
    raw = bytes(range(256))
    both = base64.b64encode(raw).decode() + "," + base64.b64encode(b"x").decode().rstrip("=")
    peer.call(1, b"", UNARY, ("key-bin", both))
    ((call, _),) = peer.requests()
    assert call.metadata == [("key-bin", raw), ("key-bin", b"x")]
    call.finish(9, "50 % of caf\u00e9\n", [("more-bin", raw), ("plain", "text")])
    answer = peer.answer()
    assert answer.status == ("9", "50 %25 of caf%C3%A9%0A")
    assert base64.b64decode(answer.headers["more-bin"] + "==") == raw
    assert answer.headers["plain"] == "text"
    # Trailers alone, in one frame.
    assert [each.kind for each in peer.frames if each.stream == 1] == [HEADERS]


def test_binary_metadata_that_are_not_base64_end_the_call() -> None:
    peer = Peer()
    peer.call(1, b"", UNARY, ("key-bin", "a%b"))
    assert peer.answer().headers["grpc-status"] == INTERNAL
    assert not peer.events()


@pytest.mark.parametrize(
    ("value", "seconds"),
    [("2H", 7200), ("3M", 180), ("1S", 1), ("99999999m", 99999.999), ("10u", 1e-5), ("7n", 7e-9)],
)
def test_timeouts_have_units(value: str, seconds: float) -> None:
    peer = Peer()
    peer.call(1, b"", UNARY, ("grpc-timeout", value))
    ((call, _),) = peer.requests()
    assert call.deadline - peer.now == pytest.approx(seconds, abs=1e-9)


@pytest.mark.parametrize(("name", "pack"), [("gzip", gzip.compress), ("deflate", zlib.compress)])
def test_compressed_messages_are_unpacked(name: str, pack: Callable[[bytes], bytes]) -> None:
    peer = Peer()
    body = b"again and again " * 1000
    packed = pack(body)
    peer.open(1, UNARY, ("grpc-encoding", name))
    peer.write(1, b"\1" + struct.pack(">I", len(packed)) + packed, ends=True)
    peer.open(3, UNARY, ("grpc-encoding", name))
    peer.write(3, message(b"not packed"), ends=True)
    assert [found for _, found in peer.requests()] == [body, b"not packed"]


@pytest.mark.parametrize(("name", "pack"), [("gzip", gzip.compress), ("deflate", zlib.compress)])
@pytest.mark.parametrize(
    ("size", "status"), [(2**20, None), (2**20 + 1, RESOURCE_EXHAUSTED), (2**26, RESOURCE_EXHAUSTED)]
)
def test_messages_are_bounded_once_unpacked(name: str, pack: Callable[[bytes], bytes], size: int, status: str) -> None:
    peer = Peer()
    packed = pack(bytes(size))
    peer.open(1, UNARY, ("grpc-encoding", name))
    peer.write(1, b"\1" + struct.pack(">I", len(packed)) + packed, ends=True)
    assert peer.answer().status[0] == status
    assert [len(found) for _, found in peer.requests()] == ([] if status else [size])


@pytest.mark.parametrize(
    ("body", "encoding", "status"),
    [
        (b"", "identity", INTERNAL),
        (b"\0\0\0\0\5abc", "identity", INTERNAL),
        (b"\7\0\0\0\0", "identity", INTERNAL),
        (b"\1\0\0\0\3abc", "identity", INTERNAL),
        (b"\1\0\0\0\3abc", "gzip", INTERNAL),
        (b"\1\0\0\0\0", "deflate", INTERNAL),
        (b"\0\xff\xff\xff\xff", "identity", RESOURCE_EXHAUSTED),
        (message(b"abc"), "zip", UNIMPLEMENTED),
    ],
)
@pytest.mark.parametrize("path", [UNARY, STREAM])
def test_broken_requests_end_with_a_status(path: str, body: bytes, encoding: str, status: str) -> None:
    peer = Peer()
    peer.open(1, path, ("grpc-encoding", encoding))
    calls = [call for _, call, _ in peer.events()]
    for call in calls:
        assert call.receive() is None
    peer.write(1, body, ends=True)
    if not body:
        peer.send(frame(DATA, END_STREAM, 1))
    for call in calls:
        assert call.receive() is None
    if calls and not body:
        # A stream may have no messages.
        assert calls[0].ended
        return
    answer = peer.answer()
    assert answer.headers["grpc-status"] == status
    assert answer.headers["grpc-accept-encoding"] == "identity, deflate, gzip"
    assert peer.requests() == []


@pytest.mark.parametrize(
    ("name", "value", "status"),
    [
        ("content-type", "application/grpc+proto", "200"),
        ("content-type", "application/grpc;charset=utf-8", "200"),
        ("content-type", "application/json", "415"),
        ("content-type", "application/grpc-web", "415"),
        (":method", "GET", "405"),
    ],
)
def test_what_is_not_grpc_is_answered_by_http(name: str, value: str, status: str) -> None:
    peer = Peer()
    peer.call(1, b"", UNARY, (name, value))
    for call, _ in peer.requests():
        peer.server.respond([(call, b"", ())])
    assert peer.answer().headers[":status"] == status


def test_a_call_without_te_ends_with_a_status() -> None:
    peer = Peer()
    peer.open(1, without="te")
    assert peer.answer().headers["grpc-status"] == INTERNAL


def test_a_method_that_is_not_known_is_opened_as_none() -> None:
    peer = Peer()
    peer.open(1, "/test.Test/None")
    call = peer.opened()
    assert (call.method, call.path) == (-1, "/test.Test/None")
    call.finish(12, "Method not found!", ())
    answer = peer.answer()
    assert answer.status == (UNIMPLEMENTED, "Method not found!")
    # The session does not wait for the rest of the request.
    assert answer.reset == NO_ERROR


def test_metadata_are_bounded() -> None:
    peer = Peer()
    peer.call(1, b"", UNARY, *((f"k{number}", "v") for number in range(300)))
    ((call, _),) = peer.requests()
    assert len(call.metadata) == 300
    block = header_block(UNARY, ("k", "v" * 17_000))
    peer.send(frame(HEADERS, 0, 3, block[:10_000]), frame(CONTINUATION, END_HEADERS, 3, block[10_000:]))
    assert peer.answer(3).headers["grpc-status"] == RESOURCE_EXHAUSTED
    assert not peer.events()


def test_requests_that_are_not_complete_are_bounded_over_all_calls() -> None:
    peer = Peer(unfinished_bytes=2**20)
    part = message(bytes(2**20))[: 2**19]
    for stream in (1, 3, 5):
        peer.open(stream)
        peer.write(stream, part)
    assert peer.answer(5).headers["grpc-status"] == RESOURCE_EXHAUSTED
    assert not peer.answer(1).ended
    # The refused call's bytes are free again for this one.
    peer.call(7, b"small")
    assert [body for _, body in peer.requests()] == [b"small"]


def test_a_deadline_ends_a_call_at_every_moment() -> None:
    peer = Peer()
    timeout = ("grpc-timeout", "1S")
    peer.open(1, UNARY, timeout)
    peer.open(3, UNARY, timeout)
    peer.write(3, message(b"abc")[:4])
    peer.call(5, b"", UNARY, timeout)
    peer.open(7, STREAM, timeout)
    peer.open(9, UNARY, ("grpc-timeout", "2S"))
    calls = {call for _, call, _ in peer.events()}
    assert peer.server.next_deadline == 1001.0
    peer.server.expire(1000.9)
    assert not peer.events()
    peer.server.expire(1001.0)
    aborted = {(kind, call) for kind, call, _ in peer.events()}
    assert aborted == {(_http2.ABORTED, call) for call in calls}
    assert {call.code for call in calls} == {int(DEADLINE_EXCEEDED)}
    for stream in (1, 3, 5, 7):
        assert peer.answer(stream).status == (DEADLINE_EXCEEDED, "Deadline Exceeded")
    assert not peer.answer(9).ended
    assert peer.server.next_deadline == 1002.0


def test_a_caller_that_leaves_aborts_its_call() -> None:
    peer = Peer()
    peer.call(1, b"")
    peer.open(3, STREAM)
    peer.open(5)
    unary, stream = (call for _, call, _ in peer.events())
    for number in (1, 3, 5):
        peer.send(cancellation(number))
    assert [(kind, call, call.code) for kind, call, _ in peer.events()] == [
        (_http2.ABORTED, unary, CANCELLED),
        (_http2.ABORTED, stream, CANCELLED),
    ]
    peer.server.respond([(unary, b"too late", ())])
    assert not stream.send(b"too late") or stream.finished
    assert not peer.answer(1).headers
    assert peer.session.calls == 0


def test_open_calls_of_methods_that_stream_are_counted() -> None:
    peer = Peer()
    peer.call(1, b"")
    peer.open(3, STREAM)
    peer.open(5, STREAM)
    assert (peer.session.calls, peer.session.streams) == (3, 2)
    peer.send(cancellation(3))
    assert (peer.session.calls, peer.session.streams) == (2, 1)
    (stream,) = (call for _, call, _ in peer.events() if call.path == STREAM and not call.finished)
    stream.finish(0, "", ())
    peer.answer(5)
    peer.send(cancellation(1))
    assert (peer.session.calls, peer.session.streams) == (0, 0)


def test_a_connection_that_is_lost_aborts_its_calls() -> None:
    peer = Peer()
    peer.call(1, b"")
    ((call, _),) = peer.requests()
    peer.session.lost()
    assert [(kind, found) for kind, found, _ in peer.events()] == [(_http2.ABORTED, call)]
    call.finish(0, "", ())
    assert peer.session.over
    assert peer.session.output(100) == b""


def windows(peer: Peer, stream: int) -> int:
    """Returns the bytes that the server allowed a stream beyond its initial window."""
    peer.receive()
    found = [each for each in peer.frames if (each.kind, each.stream) == (WINDOW_UPDATE, stream)]
    return sum(int.from_bytes(each.payload, "big") for each in found)


def test_a_stream_is_read_as_far_as_its_messages_are_asked_for() -> None:
    peer = Peer()
    (first,) = [each for each in peer.receive() if each.kind == SETTINGS and not each.flags & ACK]
    window = dict(struct.iter_unpack(">HI", first.payload))[INITIAL_WINDOW_SIZE]
    peer.send(frame(SETTINGS, ACK, 0))
    peer.open(1, STREAM)
    call = peer.opened()
    part = message(bytes(window // 4 - 5))
    for _ in range(4):
        peer.write(1, part)
    assert windows(peer, 1) == 0
    # It delays no other stream.
    peer.call(3, b"other")
    assert [body for _, body in peer.requests()] == [b"other"]
    assert windows(peer, 0) > 0
    for _ in range(3):
        assert len(call.receive() or b"") == len(part) - 5
    assert window // 2 <= windows(peer, 1) <= 3 * len(part)
    assert call.receive() is not None
    assert call.receive() is None
    # A message larger than the window is admitted once it is requested.
    large = message(bytes(2 * window))
    for begin in range(0, len(large), window // 2):
        peer.write(1, large[begin : begin + window // 2])
    assert [(kind, found) for kind, found, _ in peer.events()] == [(_http2.READABLE, call)]
    assert call.receive() == bytes(2 * window)
    assert not call.ended
    peer.send(frame(DATA, END_STREAM, 1))
    assert call.receive() is None
    assert call.ended


def test_who_waits_for_a_message_hears_of_it_and_of_the_end() -> None:
    peer = Peer()
    peer.open(1, STREAM)
    call = peer.opened()
    assert call.receive() is None
    peer.write(1, message(b"one") + message(b"two"))
    assert [kind for kind, _, _ in peer.events()] == [_http2.READABLE]
    assert (call.receive(), call.receive(), call.receive()) == (b"one", b"two", None)
    peer.write(1, message(b"last"), ends=True)
    assert [kind for kind, _, _ in peer.events()] == [_http2.READABLE]
    assert not call.ended
    assert call.receive() == b"last"
    assert call.ended
    call.send_headers([("initial", "yes")])
    call.finish(0, "", [("x", "y")])
    answer = peer.answer()
    assert (answer.headers["initial"], answer.headers["x"], answer.status[0]) == ("yes", "y", OK)


def test_who_writes_more_than_is_read_waits() -> None:
    peer = Peer(PREFACE + settings(initial_window_size=1000))
    peer.open(1, STREAM)
    call = peer.opened()
    call.reports_end = True
    sent = 0
    while call.send(bytes(995)):
        sent += 1000
    sent += 1000
    assert len(peer.answer().body) == 1000
    assert not peer.events()
    # The session's own window is 64 KiB.
    peer.send(frame(WINDOW_UPDATE, 0, 1, struct.pack(">I", sent)), frame(WINDOW_UPDATE, 0, 0, struct.pack(">I", sent)))
    assert peer.answer().body == message(bytes(995)) * (sent // 1000)
    assert [(kind, found) for kind, found, _ in peer.events()] == [(_http2.WRITABLE, call)]
    call.finish(0, "", ())
    assert not peer.events()
    assert peer.answer().ended
    assert [(kind, found) for kind, found, _ in peer.events()] == [(_http2.CLOSED, call)]


def test_pings_are_answered_and_too_many_are_not() -> None:
    peer = Peer()
    for _ in range(3):
        peer.send(frame(PING, 0, 0, b"12345678"))
        assert [each.payload for each in peer.receive() if each.kind == PING and each.flags & ACK] == [b"12345678"]
        peer.now += 5
    for stream in (1, 3, 5, 7):
        # Pings while calls are answered are allowed.
        peer.call(stream, b"")
        ((call, _),) = peer.requests()
        peer.server.respond([(call, b"", ())])
        peer.receive()
        peer.send(frame(PING, 0, 0, b"12345678"))
        peer.now += 0.5
    assert not peer.goaways()
    for _ in range(4):
        peer.send(frame(PING, 0, 0, b"12345678"))
    assert peer.goaways() == [ENHANCE_YOUR_CALM]
    assert peer.frames[-1].payload.endswith(b"too_many_pings")
    assert peer.session.over


def test_a_silent_client_is_pinged_and_left() -> None:
    peer = Peer()
    peer.receive()
    assert peer.server.tick(1059.0) == []
    assert not peer.receive()
    assert peer.server.tick(1060.0) == []
    (ping,) = peer.receive()
    assert (ping.kind, ping.flags) == (PING, 0)
    peer.now = 1070.0
    peer.send(frame(PING, ACK, 0, ping.payload))
    assert peer.server.tick(1090.0) == []
    assert peer.server.tick(1130.0) == []
    assert [each.kind for each in peer.receive()] == [PING]
    assert peer.server.tick(1151.0) == [peer.session]


@pytest.mark.parametrize("greeting", [b"", PREFACE[:10], PREFACE])
def test_a_client_that_never_greets_is_left(greeting: bytes) -> None:
    peer = Peer(greeting)
    assert peer.server.tick(1019.0) == []
    assert peer.server.tick(1021.0) == [peer.session]


def test_an_old_connection_takes_no_new_calls_and_ends_those_it_has() -> None:
    peer = Peer(age=30.0)
    peer.call(1, b"")
    ((call, _),) = peer.requests()
    peer.server.tick(1029.0)
    assert not peer.goaways()
    peer.server.tick(1030.0)
    assert peer.goaways() == [NO_ERROR]
    # It was in flight.
    peer.call(3, b"")
    ((second, _),) = peer.requests()
    (ping,) = [each for each in peer.frames if each.kind == PING]
    peer.send(frame(PING, ACK, 0, ping.payload))
    assert len(peer.goaways()) == 2
    assert int.from_bytes(peer.frames[-1].payload[:4], "big") == 3
    peer.call(5, b"")
    assert not peer.events()
    for each in (call, second):
        assert not peer.session.over
        peer.server.respond([(each, b"", ())])
        assert peer.answer(1).ended
    assert peer.answer(3).ended
    assert peer.session.over


def test_an_http1_client_learns_where_it_is() -> None:
    peer = Peer(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
    head, _, body = peer.session.output(1000).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    assert f"content-length: {len(body)}".encode() in head
    assert b"gRPC port" in body
    assert peer.session.over
    assert Peer(b"\x16\x03\x01").session.over
    assert Peer(b"\x16\x03\x01").session.output(1000) == b""


def test_a_strained_server_refuses_work_before_it_is_read() -> None:
    peer = Peer()
    trailers = [("grpc-retry-pushback-ms", "20")]

    def strained() -> None:
        """The rate is 10 per second; 4 fit a deadline of 100 ms; a call is 2."""
        peer.server.refuse(0, 1001.0, 10.0, 2.0, [(1000.1, 4.0)], 8, "the queue is full", trailers)

    strained()
    soon, near, far = (("grpc-timeout", f"{milliseconds}m") for milliseconds in (50, 400, 900))
    peer.call(1, b"", WORK, soon)
    peer.open(3, WORK, near)
    answer = peer.answer(3)
    assert answer.status == (RESOURCE_EXHAUSTED, "the queue is full")
    assert answer.headers["grpc-retry-pushback-ms"] == "20"
    assert answer.reset == NO_ERROR
    peer.call(5, b"", WORK, far)
    peer.call(7, b"", WORK)
    peer.call(9, b"", UNARY, near)
    # With the calls admitted meanwhile, too much is queued before this one, too.
    peer.call(11, b"", WORK, far)
    assert peer.answer(11).status == (RESOURCE_EXHAUSTED, "the queue is full")
    assert len(peer.requests()) == 4
    # Those are in the queue by now.
    strained()
    peer.call(13, b"", WORK, far)
    assert len(peer.requests()) == 1
    strained()
    peer.open(15, WORK, far)
    peer.open(17, WORK, far)
    # Counted until a caller leaves.
    peer.open(19, WORK, far)
    assert peer.answer(19).status == (RESOURCE_EXHAUSTED, "the queue is full")
    peer.send(cancellation(15))
    strained()
    peer.call(21, b"", WORK, far)
    assert len(peer.requests()) == 1
    peer.now = 1001.0
    peer.call(23, b"", WORK, near)
    assert len(peer.requests()) == 1
    peer.server.refuse(0, 1002.0, 0.0, 0.0, [], 8, "the queue is full", ())
    peer.call(25, b"", WORK)
    assert peer.answer(25).status == (RESOURCE_EXHAUSTED, "the queue is full")
    assert [peer.server.take_refused(peer.methods[path]) for path in (WORK, WORK, UNARY)] == [4, 0, 0]


def initial_windows(peer: Peer) -> list[int]:
    """Returns the initial windows of streams that the server has announced, in order; acknowledges them."""
    peer.receive()
    found = [each for each in peer.frames if each.kind == SETTINGS and not each.flags & ACK]
    peer.send(*(frame(SETTINGS, ACK, 0) for _ in found))
    peer.frames = [each for each in peer.frames if each not in found]
    announced = [dict(struct.iter_unpack(">HI", each.payload)) for each in found]
    return [each[INITIAL_WINDOW_SIZE] for each in announced]


def test_a_refusing_server_has_large_messages_sent_only_once_their_call_is_accepted() -> None:
    peer = Peer()
    (wide,) = initial_windows(peer)
    large = message(bytes(wide))
    peer.open(1, WORK)
    peer.open(3, STREAM)
    peer.write(1, large[:1000])
    peer.server.refuse(0, 1001.0, 1.0, 1.0, [(1000.5, 10.0)], 8, "full", ())
    near = ("grpc-timeout", "900m")
    for stream in (5, 7):
        peer.call(stream, b"", WORK, near)
        assert peer.answer(stream).status == (RESOURCE_EXHAUSTED, "full")
    # Streams that were open before have the room that they had, once the client knows.
    (narrow,) = initial_windows(peer)
    assert narrow < wide // 16
    assert windows(peer, 1) == windows(peer, 3) == wide - narrow
    peer.write(1, large[1000:], ends=True)
    assert [len(body) for _, body in peer.requests()] == [wide]
    # A small message needs no permission; a large one gets it with its call's acceptance.
    peer.call(9, b"small", WORK)
    peer.open(11, WORK)
    assert windows(peer, 11) == wide - narrow
    peer.open(13, WORK, near)
    assert (peer.answer(13).status[0], windows(peer, 13)) == (RESOURCE_EXHAUSTED, 0)
    peer.write(11, large, ends=True)
    assert [len(body) for _, body in peer.requests()] == [5, wide]
    peer.server.tick(1000.9)
    assert not initial_windows(peer)
    peer.server.tick(1001.1)
    assert initial_windows(peer) == [wide]
    peer.now = 1001.1
    peer.open(15)
    assert windows(peer, 15) == 0


CALL = frame(HEADERS, END_HEADERS, 1, header_block(STREAM))


@pytest.mark.parametrize(
    ("begin", "piece"),
    [
        (b"", frame(PING, ACK, 0, bytes(8))),
        (b"", settings(initial_window_size=65535)),
        (b"", frame(PRIORITY, 0, 1, struct.pack(">IB", 3, 7))),
        (CALL, frame(DATA, 0, 1)),
        (CALL, frame(DATA, 0x8, 1, bytes([200]) + bytes(200))),
        (b"", frame(WINDOW_UPDATE, 0, 0, struct.pack(">I", 1))),
        (CALL, frame(WINDOW_UPDATE, 0, 1, struct.pack(">I", 1))),
        (frame(HEADERS, 0, 1, header_block(UNARY)), frame(CONTINUATION, 0, 1)),
    ],
    ids=["acknowledgements", "settings", "priorities", "empty", "padding", "windows", "call", "headers"],
)
def test_a_flood_of_frames_that_bring_nothing_ends_the_connection(begin: bytes, piece: bytes) -> None:
    peer = Peer()
    peer.send(begin)
    for _ in range(100):
        peer.send(piece * 500)
    assert peer.session.over or peer.goaways()


def test_calls_that_are_reset_as_soon_as_they_are_made_end_the_connection() -> None:
    peer = Peer()
    block = header_block(UNARY)
    for stream in range(1, 80_000, 2):
        peer.send(frame(HEADERS, END_HEADERS, stream, block), cancellation(stream))
    assert peer.goaways()
    assert peer.session.calls == 0


PIECES = st.one_of(
    st.binary(max_size=40),
    st.builds(frame, st.integers(0, 12), st.integers(0, 255), st.sampled_from([0, 1, 2, 3, 5]), st.binary(max_size=40)),
    st.builds(
        lambda stream, path, flags: frame(HEADERS, END_HEADERS | flags, stream, header_block(path)),
        st.sampled_from([1, 3, 5, 7]),
        st.sampled_from([UNARY, STREAM, WORK, "/"]),
        st.sampled_from([0, END_STREAM]),
    ),
    st.builds(
        lambda stream, body, cut, flags: frame(DATA, flags, stream, message(body)[:cut]),
        st.sampled_from([1, 3, 5, 7]),
        st.binary(max_size=20),
        st.integers(0, 25),
        st.sampled_from([0, END_STREAM]),
    ),
)


@hypothesis_settings(max_examples=300)
@given(st.lists(PIECES, max_size=30), st.randoms(use_true_random=False))
def test_no_bytes_break_a_session(pieces: list[bytes], random: "object") -> None:
    peer = Peer()
    for piece in pieces:
        peer.send(piece)
        for kind, call, _ in peer.events():
            if kind == _http2.REQUEST:
                peer.server.respond([(call, b"answer", ())])
            elif kind in (_http2.OPENED, _http2.READABLE):
                while (found := call.receive()) is not None:
                    call.send(found)
                if call.ended:
                    call.finish(0, "", ())
        peer.session.output(2**20)
    peer.server.expire(2000.0)
    peer.session.lost()
    peer.events()
    assert peer.server.next_deadline == float("inf")
