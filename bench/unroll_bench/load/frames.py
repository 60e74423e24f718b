"""The parts of HTTP/2 (RFC 9113) and HPACK (RFC 7541) that a gRPC client needs, without state."""

import struct
import sys
from collections.abc import Iterable
from typing import Final
from urllib.parse import unquote

from hpack import Decoder, Encoder, HPACKError

DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = 0, 1, 3, 4, 6, 7, 8, 9
END_STREAM, ACK, END_HEADERS, PADDED, PRIORITY = 0x1, 0x1, 0x4, 0x8, 0x20
CANCEL = 8
HEADER_TABLE_SIZE, MAX_CONCURRENT_STREAMS, INITIAL_WINDOW_SIZE, MAX_FRAME_SIZE = 1, 3, 4, 5

# Length (its high byte, its low two), type, flags, stream.
FRAME_HEADER: Final = struct.Struct(">BHBBL")
# Prefix of each gRPC message: 1 if compressed, length.
PREFIX: Final = struct.Struct(">BL")
SETTING: Final = struct.Struct(">HL")
Headers = tuple[tuple[str, str], ...]
"""Names (lower case) and values."""
PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DEFAULT_WINDOW: Final = 65_535
DEFAULT_FRAME_SIZE: Final = 16_384
# Half of the largest window, so that returning credit never exceeds the limit.
RECEIVE_WINDOW: Final = 1 << 30
LAST_STREAM: Final = (1 << 31) - 1

_STATUS_NAMES: Final = (
    "OK",
    "CANCELLED",
    "UNKNOWN",
    "INVALID_ARGUMENT",
    "DEADLINE_EXCEEDED",
    "NOT_FOUND",
    "ALREADY_EXISTS",
    "PERMISSION_DENIED",
    "RESOURCE_EXHAUSTED",
    "FAILED_PRECONDITION",
    "ABORTED",
    "OUT_OF_RANGE",
    "UNIMPLEMENTED",
    "INTERNAL",
    "UNAVAILABLE",
    "DATA_LOSS",
    "UNAUTHENTICATED",
)
_ERROR_NAMES: Final = (
    "NO_ERROR",
    "PROTOCOL_ERROR",
    "INTERNAL_ERROR",
    "FLOW_CONTROL_ERROR",
    "SETTINGS_TIMEOUT",
    "STREAM_CLOSED",
    "FRAME_SIZE_ERROR",
    "REFUSED_STREAM",
    "CANCEL",
    "COMPRESSION_ERROR",
    "CONNECT_ERROR",
    "ENHANCE_YOUR_CALM",
    "INADEQUATE_SECURITY",
    "HTTP_1_1_REQUIRED",
)
OK: Final = sys.intern("OK")
_LONGEST_MESSAGE: Final = 200
_CACHED_BLOCKS: Final = 4096
_TABLE: Final = 4096  # bytes of the table that a connection begins with
_INDEXED: Final = 0x80  # in the only byte of a header that is in the table: the first 126 of its entries are


class ProtocolError(Exception):
    """The peer violated HTTP/2; the connection can no longer be used."""


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """Returns a complete frame."""
    return frame_start(len(payload), kind, flags) + stream.to_bytes(4, "big") + payload


def frame_start(size: int, kind: int, flags: int) -> bytes:
    """Returns the five bytes of a frame before its stream number, so that a frame can be reused for any stream."""
    return size.to_bytes(3, "big") + bytes((kind, flags))


def opening() -> bytes:
    """Returns the first bytes of a client: no pushes, the largest windows."""
    settings = ((2, 0), (INITIAL_WINDOW_SIZE, RECEIVE_WINDOW))
    return b"".join(
        (
            PREFACE,
            frame(SETTINGS, 0, 0, b"".join(SETTING.pack(*setting) for setting in settings)),
            frame(WINDOW_UPDATE, 0, 0, (RECEIVE_WINDOW - DEFAULT_WINDOW).to_bytes(4, "big")),
        )
    )


def error_name(code: int) -> str:
    """Returns the name of an HTTP/2 error code."""
    return _ERROR_NAMES[code] if code < len(_ERROR_NAMES) else f"error {code}"


def request_headers(path: str, authority: str, scheme: str, metadata: Iterable[tuple[str, str]]) -> Headers:
    """Returns the headers of a gRPC request.

    Raises:
        ValueError: they do not fit into one frame.
    """
    headers = (
        (":method", "POST"),
        (":scheme", scheme),
        (":path", path),
        (":authority", authority),
        ("te", "trailers"),
        ("content-type", "application/grpc"),
        ("user-agent", "unroll-load"),
        *metadata,
    )
    size = len(Encoder().encode(headers))
    if size > DEFAULT_FRAME_SIZE:
        raise ValueError(f"metadata: {size} bytes of headers, {DEFAULT_FRAME_SIZE} at most")
    return headers


class SentBlocks:
    """Makes a connection's header blocks. From the second on, equal headers are a few indexes, as gRPC's clients do."""

    def __init__(self) -> None:
        # Blocks that mean the same as long as nothing is added to the peer's table.
        self._known: dict[Headers, bytes] = {}
        self._encoder = Encoder()

    def block(self, headers: Headers) -> bytes:
        """Returns the block to send next for these headers."""
        try:
            return self._known[headers]
        except KeyError:
            pass
        block = self._encoder.encode(headers)
        if all(byte & _INDEXED for byte in block):
            self._known[headers] = block
        else:
            self._known.clear()
        return block

    def resize(self, size: int) -> None:
        """Keeps to the size of the peer's table, in bytes."""
        self._encoder.header_table_size = min(size, _TABLE)
        self._known.clear()


class Blocks:
    """Reads a connection's header blocks, each distinct one once: servers repeat the same few."""

    def __init__(self) -> None:
        # Blocks that mean the same as long as nothing is added to the table of headers.
        self._known: dict[bytes, str | None] = {}
        self._decoder = Decoder()

    def outcome(self, block: bytes) -> str | None:
        """Reads the outcome of a call from a header block.

        Returns:
            None if the call continues; "OK"; or the status's name and message ("NOT_FOUND: no such model").

        Raises:
            ProtocolError: it is not a header block.
        """
        try:
            return self._known[block]
        except KeyError:
            pass
        entries = self._decoder.header_table.dynamic_entries
        newest = entries[0] if entries else None
        try:
            pairs = [(bytes(name), bytes(value)) for name, value in self._decoder.decode(block, raw=True)]
        except HPACKError as error:
            raise ProtocolError(f"header block: {error}") from None
        outcome = _outcome({name.decode("latin-1"): value.decode("latin-1") for name, value in pairs})
        if entries and entries[0] is not newest:
            self._known.clear()
        elif len(self._known) < _CACHED_BLOCKS:  # Bounded: a peer may put the date into each answer.
            self._known[block] = outcome
        return outcome


def _outcome(headers: dict[str, str]) -> str | None:
    code = headers.get("grpc-status")
    if code is None:
        status = headers.get(":status", "200")
        # gRPC's mapping for a proxy without a gRPC server behind it (doc/http-grpc-status-mapping.md).
        return None if status == "200" else f"UNAVAILABLE: HTTP status {status}"
    if code == "0":
        return OK
    name = _STATUS_NAMES[int(code)] if code.isdecimal() and int(code) < len(_STATUS_NAMES) else f"status {code}"
    message = " ".join(unquote(headers.get("grpc-message", "")).split())[:_LONGEST_MESSAGE]
    return f"{name}: {message}" if message else name
