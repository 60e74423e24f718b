"""Serves the application by uvicorn until a signal, and lets what is in flight end."""

import signal
import socket
import ssl
import sys
from pathlib import Path
from types import FrameType

import uvicorn
from starlette.applications import Starlette

from unroll_proto.cli import InputError
from unroll_web.context import Context

# Also of idle ones, each a descriptor; further ones are answered with 503.
_MAX_CONNECTIONS = 1000


class Listener:
    """An address to serve on.

    Args:
        address: HOST:PORT; port 0 picks a free one.
        cert: PEM file of the certificate; None for plain HTTP.
        key: PEM file of its private key.

    Raises:
        InputError: the address can't be listened on, or a file can't be used.
    """

    def __init__(self, address: str, cert: Path | None, key: Path | None) -> None:
        self.host, port = _parsed(address)
        self.tls: ssl.SSLContext | None = None
        if cert is not None and key is not None:
            self.tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            try:
                self.tls.load_cert_chain(cert, key)
            except (OSError, ssl.SSLError) as error:
                raise InputError(f"--tls-cert, --tls-key: {error.strerror or error}") from None
        try:
            family = socket.getaddrinfo(self.host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]
            self.socket = socket.create_server((self.host, port), family=family, backlog=2048)
        except OSError as error:
            raise InputError(f"--listen: {address}: {(error.strerror or str(error)).lower()}") from None

    @property
    def url(self) -> str:
        """URL of the page."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self.tls else 'http'}://{host}:{self.socket.getsockname()[1]}"


def _parsed(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise InputError(f"--listen: HOST:PORT expected, got {address!r}")
    return host.removeprefix("[").removesuffix("]"), int(port)


class _Server(uvicorn.Server):
    """A server whose streams learn of its end when the signal arrives."""

    def __init__(self, config: uvicorn.Config, context: Context, announcement: str) -> None:
        super().__init__(config)
        self._context = context
        self._announcement = announcement

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listens, and announces it."""
        await super().startup(sockets)
        sys.stdout.write(f"{self._announcement}\n")
        sys.stdout.flush()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Drains: takes no more requests, and ends streams with a snapshot."""
        self._context.draining.set()
        await super().shutdown(sockets)


def serve(app: Starlette, listener: Listener, target: str, drain_timeout: int) -> None:
    """Serves until SIGTERM or SIGINT; returns when all requests in flight have ended, or their time is over.

    Args:
        app: The application, of `create_app`.
        listener: Address to serve on.
        target: The servers, for the announcement.
        drain_timeout: Seconds that requests in flight may take after the signal.
    """
    config = uvicorn.Config(
        app,
        loop="asyncio",
        http="h11",
        ws="websockets-sansio",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=_MAX_CONNECTIONS,
        timeout_graceful_shutdown=drain_timeout,
        ws_max_size=app.state.context.settings.max_body_bytes,
    )
    if (tls := listener.tls) is not None:
        config.ssl_context_factory = lambda *_: tls
    server = _Server(config, app.state.context, f"serving HTTP on {listener.url} for {target}")
    # uvicorn raises the signal again once it has drained; without a handler that would end the process by it.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _drained)
    server.run([listener.socket])


def _drained(number: int, frame: FrameType | None) -> None:
    """Does nothing: the signal has been handled."""
