"""Serves the application by uvicorn until a signal, and lets what is in flight end."""

import asyncio
import logging
import signal
import socket
import ssl
import sys
from pathlib import Path
from types import FrameType
from typing import NoReturn

import uvicorn
from starlette.applications import Starlette

from unroll_proto.cli import InputError
from unroll_web.context import Context

_log = logging.getLogger(__name__)

_RENEWAL_SECONDS = 1.0
# Also of idle ones, each a descriptor; further ones are answered with 503.
_MAX_CONNECTIONS = 1000


class Certificate:
    """A certificate for TLS, which can be renewed while it is in use.

    Args:
        chain: PEM file of the certificate.
        key: PEM file of its private key.

    Attributes:
        context: Context of new connections.

    Raises:
        InputError: a file can't be used.
    """

    def __init__(self, chain: Path, key: Path) -> None:
        self._files = chain, key
        self.context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        try:
            self._loaded = self._state()
            self.context.load_cert_chain(*self._files)
        except (OSError, ssl.SSLError) as error:
            raise InputError(f"--tls-cert, --tls-key: {error.strerror or error}") from None

    async def renew(self) -> NoReturn:
        """Loads changed files, once a second, until it is cancelled. Those that can't be used are logged once."""
        while True:
            await asyncio.sleep(_RENEWAL_SECONDS)
            try:
                state = self._state()
                if state != self._loaded:
                    self._loaded = state
                    # A context of its own first: a pair that does not fit must not leave half of it in use.
                    ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(*self._files)
                    self.context.load_cert_chain(*self._files)
                    _log.info("the renewed certificate is in use")
            except (OSError, ssl.SSLError) as error:
                _log.error("the certificate was not renewed: %s", error.strerror or error)

    def _state(self) -> list[tuple[int, int]]:
        """Returns what tells changed files from known ones; empty while one is absent."""
        try:
            return [(stat.st_mtime_ns, stat.st_ino) for stat in (file.stat() for file in self._files)]
        except OSError:
            return []


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
        self.tls = None if cert is None or key is None else Certificate(cert, key)
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

    def __init__(
        self, config: uvicorn.Config, context: Context, announcement: str, certificate: Certificate | None
    ) -> None:
        super().__init__(config)
        self._context = context
        self._certificate = certificate
        self._renewal: asyncio.Task[NoReturn] | None = None
        self._announcement = announcement

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listens, and announces it."""
        await super().startup(sockets)
        if self._certificate is not None:
            self._renewal = asyncio.create_task(self._certificate.renew())
        sys.stdout.write(f"{self._announcement}\n")
        sys.stdout.flush()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Drains: takes no more requests, and ends streams with a snapshot."""
        self._context.draining.set()
        if self._renewal is not None:
            self._renewal.cancel()
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
        config.ssl_context_factory = lambda *_: tls.context
    server = _Server(config, app.state.context, f"serving HTTP on {listener.url} for {target}", listener.tls)
    # uvicorn raises the signal again once it has drained; without a handler that would end the process by it.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _drained)
    server.run([listener.socket])


def _drained(number: int, frame: FrameType | None) -> None:
    """Does nothing: the signal has been handled."""
