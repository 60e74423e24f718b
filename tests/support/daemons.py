"""Servers of others, such as Redis, as child processes that announce nothing when they are ready."""

import signal
import socket
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from support.waiting import wait_until


def free_port() -> int:
    """Returns a free port of the loopback interface."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def listens(port: int) -> bool:
    """Returns whether a process listens on a port of the loopback interface."""
    with socket.socket() as connection:
        return connection.connect_ex(("127.0.0.1", port)) == 0


class Daemon:
    """A running command, killed at the end; a test can kill it before, and start it again.

    Args:
        command: The command.
        log: File to which its output is appended.
        answers: Returns True once it is ready.

    Raises:
        AssertionError: it ended before it was ready. The message is its log.
    """

    def __init__(self, command: Sequence[str | Path], log: Path, answers: Callable[[], bool]) -> None:
        self._command = command
        self._answers = answers
        self.log = log
        self.start()

    def start(self) -> None:
        """Starts the process, and waits until it is ready."""
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log)
        wait_until(lambda: self._answers() or self._process.poll() is not None, self.log.read_text)
        assert self._process.poll() is None, self.log.read_text()

    def signal(self, number: signal.Signals) -> None:
        """Sends a signal: SIGSTOP to suspend the process, SIGCONT to resume it."""
        self._process.send_signal(number)

    def kill(self) -> None:
        """Ends the process as a power cut does."""
        self._process.kill()
        self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
