"""Real command and server processes, ended by their own id."""

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

BIN = Path(sys.executable).parent
PATIENCE = 120.0
"""Seconds after which a process that does not get on is called stuck."""


def run(
    *command: str | Path, check: bool = True, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs an installed command of the environment that the tests run in."""
    done = subprocess.run(
        [BIN / command[0], *command[1:]],
        capture_output=True,
        text=True,
        timeout=PATIENCE * 5,
        env={**os.environ, **(env or {})},
        check=False,
    )
    if check and done.returncode:
        raise AssertionError(f"{command} exited with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done


class ServerProcess:
    """A running `unroll-serve` on a free port of the loopback interface.

    Args:
        models: The model repository.
        log: File that takes what it logs.
        options: Further options.
        env: Variables beside the tests' own.
        executables: Folder of the environment to run it from.

    Attributes:
        address: HOST:PORT.
        announcement: The line that it printed when it was ready.
    """

    def __init__(
        self, models: Path, log: Path, *options: str, env: Mapping[str, str] | None = None, executables: Path = BIN
    ) -> None:
        self._log = log
        with log.open("wb") as stderr:
            self.process = subprocess.Popen(
                [executables / "unroll-serve", "--models", models, "--listen", "127.0.0.1:0", *options],
                stdout=subprocess.PIPE,
                stderr=stderr,
                env={**os.environ, **(env or {})},
            )
        self.announcement = self._first_line()
        self.address = self.announcement.split(" on ")[1].split()[0]

    def _first_line(self) -> str:
        assert self.process.stdout is not None
        deadline = time.monotonic() + PATIENCE
        ready, _, _ = select.select([self.process.stdout], [], [], PATIENCE)
        line = self.process.stdout.readline().decode() if ready else ""
        if not line:
            self.process.kill()
            self.process.wait()
            self.process.stdout.close()
            late = time.monotonic() >= deadline
            raise AssertionError(f"the server {'did not start in time' if late else 'ended'}:\n{self.log}")
        return line.strip()

    @property
    def log(self) -> str:
        """What the server has logged."""
        return self._log.read_text()

    def signal(self, number: signal.Signals) -> None:
        """Sends a signal."""
        self.process.send_signal(number)

    def wait(self) -> int:
        """Waits for the end and returns the exit code."""
        try:
            return self.process.wait(PATIENCE)
        finally:
            if self.process.stdout and not self.process.stdout.closed:
                self.process.stdout.close()

    def stop(self) -> int:
        """Drains the server and returns its exit code."""
        if self.process.poll() is None:
            self.signal(signal.SIGTERM)
        return self.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.wait()
