"""Real command and server processes, ended by their ids."""

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

BIN = Path(sys.executable).parent
TRAINING_BIN = Path(os.environ.get("UNROLL_TEST_TRAINING_BIN", BIN))
"""Folder of `unroll-train` and `unroll-export`, in another environment if this one has no torch."""
PATIENCE = 120.0
"""Seconds without progress after which a process counts as stuck."""


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


def without(package: str, folder: Path) -> dict[str, str]:
    """Returns the environment of a process that can't import a package, by a file in `folder`."""
    (folder / f"{package}.py").write_text(f"raise ImportError({package!r}, name={package!r})\n")
    return {"PYTHONPATH": os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))}


class Holding(NamedTuple):
    """Resources of a process: resident bytes, open descriptors, threads."""

    resident: int
    descriptors: int
    threads: int

    @classmethod
    def of(cls, pid: int) -> Self:
        """Reads them from the kernel; raises OSError if there is no such process."""
        process = Path(f"/proc/{pid}")
        pages = int((process / "statm").read_text().split()[1])
        descriptors, threads = (sum(1 for _ in (process / name).iterdir()) for name in ("fd", "task"))
        return cls(pages * os.sysconf("SC_PAGE_SIZE"), descriptors, threads)


class AnnouncedProcess:
    """A running command that prints a line with its address when it is ready.

    Args:
        command: The command.
        log: File for its log.
        env: Further environment variables.

    Attributes:
        address: HOST:PORT or URL.
        announcement: The line that it printed when it was ready.
    """

    def __init__(self, command: Sequence[str | Path], log: Path, env: Mapping[str, str] | None = None) -> None:
        self._log = log
        with log.open("wb") as stderr:
            self.process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=stderr, env={**os.environ, **(env or {})}
            )
        self.announcement = self._first_line()
        self.address = self.announcement.split(" on ")[1].split()[0]

    def _first_line(self) -> str:
        assert self.process.stdout is not None
        deadline = time.monotonic() + PATIENCE
        ready, _, _ = select.select([self.process.stdout], [], [], PATIENCE)
        line = self.process.stdout.readline().decode() if ready else ""
        if not line:
            self._kill()
            self.process.wait()
            self.process.stdout.close()
            late = time.monotonic() >= deadline
            raise AssertionError(f"the process {'did not start in time' if late else 'ended'}:\n{self.log}")
        return line.strip()

    @property
    def log(self) -> str:
        """The server's log so far."""
        return self._log.read_text()

    def signal(self, number: signal.Signals) -> None:
        """Sends a signal; SIGKILL goes to every process of the server, as when its machine dies."""
        if number == signal.SIGKILL:
            self._kill()
        else:
            self.process.send_signal(number)

    def _kill(self) -> None:
        # The parent first, or it would start new children.
        for pid in self._stats():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def cpu_seconds(self) -> float:
        """Returns the processor time of all live processes of the server."""
        ticks = sum(int(fields[11]) + int(fields[12]) for fields in self._stats().values())
        return ticks / os.sysconf("SC_CLK_TCK")

    def family(self) -> "list[Holding]":
        """Returns the resources of each live process of the server."""
        found = []
        for pid in self._stats():
            # A process that has just ended has no resources.
            with suppress(OSError):
                found.append(Holding.of(pid))
        return found

    def _stats(self) -> dict[int, list[str]]:
        """Returns the fields of /proc/PID/stat, from the state on, of the process and its descendants."""
        if self.process.returncode is not None:
            return {}
        every = {}
        for path in Path("/proc").glob("[0-9]*/stat"):
            with suppress(OSError):
                every[int(path.parent.name)] = path.read_text().rpartition(")")[2].split()
        family = {self.process.pid: every.get(self.process.pid, ["0"] * 13)}  # zeros without /proc
        # A child can have a lower number than its parent, so that one pass is not enough.
        while more := {pid: stat for pid, stat in every.items() if int(stat[1]) in family and pid not in family}:
            family |= more
        return family

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
        self._kill()
        self.wait()


class ServerProcess(AnnouncedProcess):
    """A running `unroll-serve` on a free port of the loopback interface.

    Args:
        models: The model repository.
        log: File for its log.
        options: Further options.
        env: Further environment variables.
        tuning: Settings of `[tuning]`.
        executables: Folder of the environment to run it from.
    """

    def __init__(
        self,
        models: Path | str,
        log: Path,
        *options: str,
        env: Mapping[str, str] | None = None,
        tuning: Mapping[str, float] | None = None,
        executables: Path = BIN,
    ) -> None:
        tuned = {f"UNROLL_TUNING_{name.upper()}": str(value) for name, value in (tuning or {}).items()}
        command: list[str | Path] = [executables / "unroll-serve", "--models", models, "--listen", "127.0.0.1:0"]
        super().__init__([*command, *options], log, {**(env or {}), **tuned})


class WebProcess(AnnouncedProcess):
    """A running `unroll web` on a free port of the loopback interface; its address is a URL.

    Args:
        server: HOST:PORT of the server.
        log: File for its log.
        options: Further options.
        env: Further environment variables.
        executables: Folder of the environment to run it from.
    """

    def __init__(
        self,
        server: str,
        log: Path,
        *options: str,
        env: Mapping[str, str] | None = None,
        executables: Path = BIN,
    ) -> None:
        command: list[str | Path] = [executables / "unroll", "web", "--server", server, "--listen", "127.0.0.1:0"]
        super().__init__([*command, *options], log, env)


def made_by_make(environment: str) -> Path:
    """Makes an environment of the Makefile, such as `.venv-deploy`, unless it is made; returns its folder."""
    root = Path(__file__).parents[2]
    command = ["make", f"PYTHON={Path(sys.executable).resolve()}", f"{environment}/done"]
    made = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=5 * PATIENCE, check=False)
    assert made.returncode == 0, made.stdout + made.stderr
    return root / environment
