"""Listening sockets of the native transport, and TLS of accepted connections."""

import asyncio
import errno
import logging
import os
import socket
import ssl
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress

from unroll_server.addresses import SOCKET_MODE, WILDCARD, Address, family_of
from unroll_server.transport.limits import HANDSHAKE
from unroll_server.transport.native.connection import HTTP2, Connection
from unroll_server.transport.tls import Certificates, Pem

_log = logging.getLogger(__name__)

BACKLOG = 1024
"""Most connections that wait to be accepted on a socket."""
AT_ONCE = 64
"""Most connections accepted on a socket in one turn of the event loop."""
RETRY = 1.0
"""Seconds without new connections after the process has run out of descriptors."""
_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


@contextmanager
def listening(address: Address, share_port: bool) -> Iterator[tuple[list[socket.socket], str]]:
    """Listens on an address.

    Yields:
        The sockets, and the address with the port that it got.

    Raises:
        StartupError: the address can't be listened on.
    """
    with ExitStack() as opened:
        if address.path:
            opened.enter_context(address.claimed_path())
            listener = opened.enter_context(socket.socket(socket.AF_UNIX))
            umask = os.umask(0o777 & ~SOCKET_MODE)
            try:
                listener.bind(address.path)
            except OSError as error:
                raise address.problem(error.strerror or str(error)) from None
            finally:
                os.umask(umask)
            sockets = [listener]
        else:
            sockets, port = [], address.port
            for host in address.hosts(share_port):
                sockets.append(opened.enter_context(_bound(address, host, port, share_port)))
                port = sockets[0].getsockname()[1]
            address = address._replace(port=port)
        for each in sockets:
            each.setblocking(False)
            each.listen(BACKLOG)
        yield sockets, str(address)


def _bound(address: Address, host: str, port: int, share_port: bool) -> socket.socket:
    bound = socket.socket(family_of(host), socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT if share_port else socket.SO_REUSEADDR, 1)
    if bound.family == socket.AF_INET6:
        bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(host != WILDCARD[socket.AF_INET6]))
    try:
        # The address was free a moment ago.
        bound.bind((host.partition("%")[0], port, 0, int(host.partition("%")[2] or 0)) if ":" in host else (host, port))
    except OSError as error:
        bound.close()
        raise address.problem(error.strerror or str(error)) from None
    return bound


class Listener:
    """Accepts connections on a socket.

    Args:
        listener: The socket.
        make: Makes the protocol of a connection; None to close it.
        certificates: Certificates for TLS, checked before each handshake; None for plaintext.
    """

    def __init__(
        self, listener: socket.socket, make: Callable[[], Connection | None], certificates: Certificates | None
    ) -> None:
        self._socket = listener
        self._make = make
        self._certificates = certificates
        self._tls = None if certificates is None else tls_context(certificates.current)
        self._loop = asyncio.get_running_loop()
        self._shaking_hands: set[asyncio.Task[None]] = set()
        self._loop.add_reader(listener, self._accept)

    def close(self) -> None:
        """Stops accepting connections."""
        self._loop.remove_reader(self._socket)
        self._socket.close()

    def _accept(self) -> None:
        for _ in range(AT_ONCE):
            try:
                accepted, _ = self._socket.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                if error.errno in _EXHAUSTED:
                    self._rest(error)
                return
            accepted.setblocking(False)
            protocol = self._make()
            if protocol is None:
                accepted.close()
                continue
            task = self._loop.create_task(self._serve(accepted, protocol))
            self._shaking_hands.add(task)
            task.add_done_callback(self._shaking_hands.discard)

    def _rest(self, error: OSError) -> None:
        _log.error("no new connections for %g s: %s", RETRY, error.strerror)
        self._loop.remove_reader(self._socket)

        def resume() -> None:
            if self._socket.fileno() >= 0:
                self._loop.add_reader(self._socket, self._accept)

        self._loop.call_later(RETRY, resume)

    async def _serve(self, accepted: socket.socket, protocol: Connection) -> None:
        if self._certificates and (fresh := self._certificates.renewed()):
            self._tls = tls_context(fresh)
        try:
            await self._loop.connect_accepted_socket(
                lambda: protocol, accepted, ssl=self._tls, ssl_handshake_timeout=HANDSHAKE if self._tls else None
            )
        except (OSError, ssl.SSLError):
            # The handshake failed: a scanner, or a caller without a valid certificate.
            protocol.connection_lost(None)


def tls_context(pem: Pem) -> ssl.SSLContext:
    """Returns the TLS of connections with these certificates, for HTTP/2."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.set_alpn_protocols([HTTP2])
    with tempfile.TemporaryDirectory() as folder:
        # ssl reads only files, and the original files may have changed meanwhile.
        path = os.path.join(folder, "pem")  # noqa: PTH118
        with open(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600), "wb") as file:  # noqa: PTH123
            file.write(pem.key + b"\n" + pem.chain)
        context.load_cert_chain(path)
    if pem.client_ca is not None:
        context.verify_mode = ssl.CERT_REQUIRED
        with suppress(UnicodeDecodeError):
            context.load_verify_locations(cadata=pem.client_ca.decode())
    return context
