"""The gRPC wire protocol, apart from any transport: frames, compression, timeouts, metadata, status.

Source: https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md, doc/compression.md and doc/statuscodes.md there.
"""

import binascii
import re
import zlib
from collections import deque
from collections.abc import Iterable

import grpc

Headers = Iterable[tuple[bytes, bytes]]
Metadata = Iterable[tuple[str, str | bytes]]

CODECS = {b"gzip": 31, b"deflate": 15}
"""The compressions beside identity, each with zlib's window bits for it."""
ACCEPT_ENCODING = b"identity,deflate,gzip"
HEADER_BYTES = 5
"""A frame's flag (1 if compressed) and the length of its message, big-endian."""

_TIMEOUT = re.compile(rb"([0-9]{1,8})([HMSmun])")
_SECONDS = {b"H": 3600.0, b"M": 60.0, b"S": 1.0, b"m": 1e-3, b"u": 1e-6, b"n": 1e-9}
_KEY = re.compile(r"[0-9a-z_.\-]+")
_VALUE = re.compile(r"[\x20-\x7e]*")
_UNSAFE = re.compile(rb"[^\x20-\x24\x26-\x7e]")
_RESERVED = frozenset(
    {
        "connection",
        "content-length",
        "content-type",
        "grpc-accept-encoding",
        "grpc-encoding",
        "grpc-message",
        "grpc-status",
        "grpc-timeout",
        "host",
        "te",
        "transfer-encoding",
    }
)


class WireError(Exception):
    """A call that breaks the protocol or a limit, with the status that ends it."""

    def __init__(self, code: grpc.StatusCode, details: str) -> None:
        super().__init__(details)
        self.code = code
        self.details = details


def frame(message: bytes) -> bytes:
    """An uncompressed message with its header."""
    return b"\0" + len(message).to_bytes(4, "big") + message


def compressed_frame(message: bytes, codec: bytes) -> bytes:
    """A message compressed by one of `CODECS`, with its header."""
    compressor = zlib.compressobj(wbits=CODECS[codec])
    data = compressor.compress(message) + compressor.flush()
    return b"\1" + len(data).to_bytes(4, "big") + data


def too_large(size: int, limit: int) -> WireError:
    """What a message over the limit is answered, in grpcio's words."""
    return WireError(
        grpc.StatusCode.RESOURCE_EXHAUSTED, f"SERVER: Received message larger than max ({size} vs. {limit})"
    )


def decompress(data: bytes, codec: bytes | None, limit: int) -> bytes:
    """Undoes the compression of a message.

    Args:
        data: What the frame held.
        codec: The call's grpc-encoding; None where there was none, or identity.
        limit: The largest message in bytes; no more than that is ever decompressed.

    Raises:
        WireError: RESOURCE_EXHAUSTED past the limit; INTERNAL for data that is no such thing.
    """
    if codec is None:
        raise WireError(grpc.StatusCode.INTERNAL, "a compressed message without grpc-encoding")
    decompressor = zlib.decompressobj(wbits=CODECS[codec])
    try:
        message = decompressor.decompress(data, limit + 1)
    except zlib.error as error:
        raise WireError(grpc.StatusCode.INTERNAL, f"a message that is not {codec.decode()}: {error}") from None
    if len(message) > limit:
        raise too_large(len(message), limit)
    if not decompressor.eof or decompressor.unused_data:
        raise WireError(grpc.StatusCode.INTERNAL, f"a message that is not {codec.decode()}: it is cut or goes on")
    return message


class FrameReader:
    """Cuts the pieces of a body into messages, wherever the pieces were cut.

    Args:
        limit: The largest message in bytes, as sent and decompressed.
        codec: The call's grpc-encoding; None for identity.

    Attributes:
        messages: Those that are complete and not yet taken.
        waiting: Bytes of the message that is not complete.
    """

    __slots__ = ("_codec", "_limit", "_needed", "_pieces", "messages", "waiting")

    def __init__(self, limit: int, codec: bytes | None) -> None:
        self._limit = limit
        self._codec = codec
        self._pieces: list[bytes] = []
        self._needed = HEADER_BYTES
        self.messages: deque[bytes] = deque()
        self.waiting = 0

    def feed(self, data: bytes) -> None:
        """Takes the next piece.

        Raises:
            WireError: the messages up to here are good, the one after them breaks a limit or the protocol.
        """
        if self.waiting:
            self._pieces.append(data)
            self.waiting += len(data)
            # A message in many pieces is joined once, when it is whole.
            if self.waiting < self._needed:
                return
            data = b"".join(self._pieces)
            self._pieces.clear()
        begin, end = 0, len(data)
        self._needed = HEADER_BYTES
        while end - begin >= HEADER_BYTES:
            flag = data[begin]
            body = begin + HEADER_BYTES
            size = int.from_bytes(data[begin + 1 : body], "big")
            if size > self._limit:
                raise too_large(size, self._limit)
            if flag > 1:
                raise WireError(grpc.StatusCode.INTERNAL, f"a frame of kind {flag}, 0 or 1 expected")
            if end - body < size:
                self._needed = HEADER_BYTES + size
                break
            message = data[body : body + size]
            self.messages.append(decompress(message, self._codec, self._limit) if flag else message)
            begin = body + size
        self.waiting = end - begin
        if self.waiting:
            self._pieces.append(data[begin:] if begin else data)


def seconds_of(timeout: bytes) -> float:
    """The seconds of a grpc-timeout.

    Raises:
        WireError: INTERNAL for what is not 1 to 8 digits and a unit.
    """
    match = _TIMEOUT.fullmatch(timeout)
    if not match:
        raise WireError(grpc.StatusCode.INTERNAL, f"malformed grpc-timeout {timeout!r}")
    return int(match[1]) * _SECONDS[match[2]]


def decode_metadata(headers: Headers) -> tuple[tuple[str, str | bytes], ...]:
    """The caller's metadata among the headers, in order; keys can repeat, values of `-bin` keys are bytes.

    Raises:
        WireError: INTERNAL for a `-bin` value that is not base64.
    """
    found: list[tuple[str, str | bytes]] = []
    for name, value in headers:
        key = name.decode("latin-1")
        if key in _RESERVED or key.startswith(":"):
            continue
        if not key.endswith("-bin"):
            found.append((key, value.decode("latin-1")))
            continue
        for part in value.split(b","):
            raw = part.strip()
            try:
                decoded = binascii.a2b_base64(raw.rstrip(b"=") + b"=" * (-len(raw.rstrip(b"=")) % 4), strict_mode=True)
            except binascii.Error:
                raise WireError(grpc.StatusCode.INTERNAL, f"metadata {key}: not base64") from None
            found.append((key, decoded))
    return tuple(found)


def encode_metadata(metadata: Metadata) -> list[tuple[bytes, bytes]]:
    """Headers or trailers of what a servicer set.

    Raises:
        ValueError: a key or value that can't be sent, or a name that is the protocol's own.
    """
    headers = []
    for key, value in metadata:
        if not _KEY.fullmatch(key) or key in _RESERVED:
            raise ValueError(f"{key!r} can't be a metadata key")
        if key.endswith("-bin"):
            raw = value.encode() if isinstance(value, str) else value
            headers.append((key.encode(), binascii.b2a_base64(raw, newline=False).rstrip(b"=")))
            continue
        text = value.decode("latin-1") if isinstance(value, bytes) else value
        if not _VALUE.fullmatch(text):
            raise ValueError(f"metadata {key}: only printable ASCII can be sent under a key that does not end in -bin")
        headers.append((key.encode(), text.encode()))
    return headers


def encode_status(code: int, details: str) -> list[tuple[bytes, bytes]]:
    """The trailers that end a call; details are percent-encoded UTF-8."""
    trailers = [(b"grpc-status", b"%d" % code)]
    if details:
        raw = details.encode("utf-8", "replace")
        trailers.append((b"grpc-message", _UNSAFE.sub(lambda match: b"%%%02X" % match[0][0], raw)))
    return trailers
