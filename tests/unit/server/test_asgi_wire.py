"""The gRPC wire protocol: what any cut, compression, timeout, metadata and status become."""

import base64
import itertools
import urllib.parse
import zlib

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st
from unit.server.asgi_driver import framed

from unroll_server.fronts import grpc_wire
from unroll_server.fronts.grpc_wire import FrameReader, WireError

LIMIT = 300
MESSAGES = st.lists(st.tuples(st.binary(max_size=LIMIT), st.booleans()), max_size=8)


def cut(body: bytes, positions: list[int]) -> list[bytes]:
    places = sorted({0, len(body), *(position % (len(body) + 1) for position in positions)})
    return [body[begin:end] for begin, end in itertools.pairwise(places)]


@given(messages=MESSAGES, codec=st.sampled_from([b"gzip", b"deflate"]), positions=st.lists(st.integers(0, 5000)))
def test_messages_survive_any_cut_and_either_compression(
    messages: list[tuple[bytes, bool]], codec: bytes, positions: list[int]
) -> None:
    body = b"".join(
        grpc_wire.compressed_frame(message, codec) if packed else grpc_wire.frame(message)
        for message, packed in messages
    )
    reader = FrameReader(LIMIT + 50, codec)
    got: list[bytes] = []
    for piece in cut(body, positions):
        reader.feed(piece)
        got += reader.messages
        reader.messages.clear()
    assert got == [message for message, _ in messages]
    assert reader.waiting == 0


@given(messages=st.lists(st.binary(max_size=40), max_size=4), missing=st.integers(1, 4))
def test_what_is_not_whole_waits(messages: list[bytes], missing: int) -> None:
    reader = FrameReader(LIMIT, None)
    reader.feed(framed(*messages, b"the last")[:-missing])
    assert list(reader.messages) == messages
    assert reader.waiting == 13 - missing


@pytest.mark.parametrize("pieces", [1, 2, 9])
def test_the_limit_holds_before_the_message_has_come(pieces: int) -> None:
    reader = FrameReader(LIMIT, None)
    reader.feed(framed(bytes(LIMIT)))
    header = b"\0" + (LIMIT + 1).to_bytes(4, "big")
    *first, last = cut(header, list(range(pieces)))
    for piece in first:
        reader.feed(piece)
    with pytest.raises(WireError, match=r"SERVER: Received message larger than max \(301 vs. 300\)") as caught:
        reader.feed(last)
    assert caught.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert list(reader.messages) == [bytes(LIMIT)]


@pytest.mark.parametrize("codec", [b"gzip", b"deflate"])
def test_the_limit_holds_for_what_a_message_unpacks_to(codec: bytes) -> None:
    bomb = grpc_wire.compressed_frame(bytes(50_000_000), codec)
    assert len(bomb) < 60_000
    with pytest.raises(WireError) as caught:
        FrameReader(60_000, codec).feed(bomb)
    assert caught.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.mark.parametrize(
    ("codec", "data"),
    [
        (None, zlib.compress(b"abc")),
        (b"gzip", zlib.compress(b"abc")),
        (b"deflate", b"abc"),
        (b"deflate", b""),
        (b"deflate", zlib.compress(b"abc")[:-1]),
        (b"deflate", zlib.compress(b"abc") + b"x"),
    ],
)
def test_what_is_not_compressed_as_it_says_is_internal(codec: bytes | None, data: bytes) -> None:
    with pytest.raises(WireError) as caught:
        FrameReader(LIMIT, codec).feed(b"\1" + len(data).to_bytes(4, "big") + data)
    assert caught.value.code is grpc.StatusCode.INTERNAL


@given(st.integers(0, 99_999_999), st.sampled_from("HMSmun"))
def test_every_unit_of_a_timeout(value: int, unit: str) -> None:
    scale = {"H": 3600, "M": 60, "S": 1, "m": 1e-3, "u": 1e-6, "n": 1e-9}[unit]
    assert grpc_wire.seconds_of(f"{value}{unit}".encode()) == pytest.approx(value * scale)


@pytest.mark.parametrize("timeout", [b"", b"1", b"S", b"-1S", b"1.5S", b"1s", b"123456789S", b"1S ", b"\xb2S"])
def test_a_malformed_timeout_is_refused(timeout: bytes) -> None:
    with pytest.raises(WireError, match="malformed grpc-timeout"):
        grpc_wire.seconds_of(timeout)


@given(st.lists(st.binary(), min_size=1), st.booleans(), st.booleans())
def test_binary_metadata_is_base64_padded_or_not_joined_or_not(values: list[bytes], padded: bool, joined: bool) -> None:
    encoded = [base64.b64encode(value) for value in values]
    if not padded:
        encoded = [value.rstrip(b"=") for value in encoded]
    lines = [b",".join(encoded)] if joined else encoded
    got = grpc_wire.decode_metadata([(b"a-bin", line) for line in lines])
    assert got == tuple(("a-bin", value) for value in values)


@given(
    st.lists(
        st.tuples(st.sampled_from(["a", "b-c", "d.e_1"]), st.text(st.characters(min_codepoint=32, max_codepoint=126)))
    )
)
def test_metadata_keep_their_order_and_repeated_keys(pairs: list[tuple[str, str]]) -> None:
    assert grpc_wire.decode_metadata(grpc_wire.encode_metadata(pairs)) == tuple(pairs)


def test_the_protocol_s_own_headers_are_no_metadata() -> None:
    names = [b"te", b"content-type", b"grpc-timeout", b"grpc-encoding", b"grpc-accept-encoding", b"host", b":path"]
    assert grpc_wire.decode_metadata([*((name, b"x") for name in names), (b"user-agent", b"u")]) == (
        ("user-agent", "u"),
    )


@pytest.mark.parametrize("value", [b"!", b"a", b"YWJj,?", b"YW=Jj"])
def test_binary_metadata_that_are_not_base64_are_refused(value: bytes) -> None:
    with pytest.raises(WireError, match="not base64"):
        grpc_wire.decode_metadata([(b"a-bin", value)])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("A", "x"),
        ("", "x"),
        ("a b", "x"),
        ("grpc-status", "0"),
        ("te", "x"),
        ("a", "x\r\nb: c"),
        ("a", "ü"),
        ("é", "x"),
    ],
)
def test_metadata_that_can_t_be_sent_are_refused(key: str, value: str) -> None:
    with pytest.raises(ValueError, match="metadata"):
        grpc_wire.encode_metadata([(key, value)])


@given(st.text(min_size=1))
def test_details_of_a_status_are_percent_encoded(details: str) -> None:
    (_, status), (name, message) = grpc_wire.encode_status(5, details)
    assert (status, name) == (b"5", b"grpc-message")
    assert all(0x20 <= byte <= 0x7E for byte in message)
    assert urllib.parse.unquote_to_bytes(message) == details.encode("utf-8", "replace")
