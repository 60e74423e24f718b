"""A connection of the native transport: bytes between asyncio's transport and its HTTP/2 session."""

import asyncio
import socket
import ssl
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from urllib.parse import quote

from unroll_server.transport.native._http2 import Server, Session

CHUNK = 256 * 1024
"""Most bytes given to the socket at once."""
HTTP2 = "h2"
"""The protocol's name, as TLS negotiates it (ALPN)."""
_NAMES = ("DNS", "URI", "email", "IP Address")


class Connection(Session, asyncio.BufferedProtocol):
    """A connection.

    Args:
        server: Server of its calls.
        buffer: What it reads into. All connections of an event loop share it: each processes at once what it read.
        age: Seconds after which it refuses new calls; 0 for no limit.
        changed: Called when there may be events or data to send.
        refused: Called after a read with calls that an overloaded server refused unread.
        left: Called when it is closed.

    Attributes:
        peer: The other side's address, as gRPC writes it.
        auth: Properties of the caller's certificate, as grpcio names them; empty without one.
        rests: True between `rest` and `wake`.
    """

    def __init__(
        self,
        server: Server,
        buffer: memoryview,
        age: float,
        changed: Callable[[], None],
        refused: Callable[["Connection"], None],
        left: Callable[["Connection"], None],
    ) -> None:
        super().__init__(server, time.monotonic(), age)
        self._buffer = buffer
        self._changed = changed
        self._refused = refused
        self._left = left
        self._transport: asyncio.Transport | None = None
        # Nothing is written or read while the caller does not read, and nothing is read during a rest.
        self._is_paused = False
        self.rests = False
        self._closed: asyncio.Future[None] | None = None
        self.peer = ""
        self.auth: Mapping[str, Sequence[bytes]] = {}

    def connection_made(self, transport: Any) -> None:
        """See asyncio.BufferedProtocol."""
        self._transport = transport
        self.peer = _peer(transport)
        secured = transport.get_extra_info("ssl_object")
        if secured is not None:
            if secured.selected_alpn_protocol() != HTTP2:
                transport.abort()
            self.auth = _properties(secured)
        self._changed()

    def get_buffer(self, sizehint: int) -> memoryview:
        """See asyncio.BufferedProtocol."""
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        """See asyncio.BufferedProtocol."""
        if self.receive(self._buffer[:nbytes], time.monotonic()):
            self._refused(self)
            self.flush()
        self._changed()

    def eof_received(self) -> bool:
        """See asyncio.BufferedProtocol."""
        return False

    def pause_writing(self) -> None:
        """See asyncio.BufferedProtocol. A caller that does not read is not read from either."""
        self._is_paused = True
        if self._transport:
            self._transport.pause_reading()

    def resume_writing(self) -> None:
        """See asyncio.BufferedProtocol."""
        self._is_paused = False
        self._read_again()
        if self._transport and not self._transport.is_closing():
            self.flush()
            self._changed()

    def connection_lost(self, error: Exception | None) -> None:
        """See asyncio.BufferedProtocol."""
        self._transport = None
        self.lost()
        if self._closed:
            self._closed.set_result(None)
        self._left(self)
        self._changed()

    def flush(self) -> None:
        """Sends pending data as far as the socket accepts it."""
        transport = self._transport
        if transport is None:
            return
        while not self._is_paused and (data := self.output(CHUNK)):
            transport.write(data)
        if self.over and not self._is_paused:
            transport.close()

    def rest(self) -> None:
        """Stops reading until `wake`; what is to be sent waits, too."""
        if self._transport and not self._transport.is_closing():
            self.rests = True
            self._transport.pause_reading()

    def wake(self) -> None:
        """Ends a rest."""
        self.rests = False
        self.flush()
        self._read_again()

    @property
    def closed(self) -> asyncio.Future[None]:
        """Done once the connection has closed; one object, to add callbacks to."""
        if self._closed is None:
            self._closed = asyncio.get_running_loop().create_future()
            if self._transport is None:
                self._closed.set_result(None)
        return self._closed

    def _read_again(self) -> None:
        if self._transport and not self._transport.is_closing() and not (self._is_paused or self.rests):
            self._transport.resume_reading()

    def abort(self) -> None:
        """Closes the connection at once."""
        if self._transport:
            self._transport.abort()

    def close(self) -> None:
        """Closes the connection once buffered data is sent."""
        self.flush()
        if self._transport:
            self._transport.close()


def _peer(transport: asyncio.Transport) -> str:
    address: Any = transport.get_extra_info("peername")
    family = getattr(transport.get_extra_info("socket"), "family", None)
    if family == socket.AF_INET6:
        return f"ipv6:{quote(f'[{address[0]}]', safe='')}:{address[1]}"
    return f"ipv4:{address[0]}:{address[1]}" if family == socket.AF_INET else "unix:"


def _properties(secured: ssl.SSLObject) -> dict[str, list[bytes]]:
    found: Any = secured.getpeercert() or {}
    names = [value.encode() for kind, value in found.get("subjectAltName", ()) if kind in _NAMES]
    common = [value.encode() for part in found.get("subject", ()) for key, value in part if key == "commonName"]
    return {"transport_security_type": [b"ssl"], "x509_common_name": common, "x509_subject_alternative_name": names}
