"""Servers as processes on one core, each in its own session, so that their child processes end with them."""

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

PATIENCE = 60.0
"""Seconds within which a server must start or end."""
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "ORT_DISABLE_TELEMETRY": "1"}


class StartError(Exception):
    """A contestant can't run here; the message is one line with the reason."""


class Server:
    """A running server process.

    Attributes:
        address: HOST:PORT.
    """

    def __init__(self, process: asyncio.subprocess.Process, address: str) -> None:
        self._process = process
        self.address = address

    @classmethod
    async def start(
        cls, command: Sequence[str | Path], core: int, log: Path, env: Mapping[str, str] | None = None
    ) -> "Server":
        """Starts `command`, which prints a line that holds "on HOST:PORT" once it serves.

        Raises:
            StartError: it ended before, or took too long.
        """
        with log.open("wb") as stderr:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "unroll_bench.contest.confine", str(core), *command),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=stderr,
                env={**_environment(), **ONE_THREAD, **(env or {})},
                start_new_session=True,
            )
        server = cls(process, "")
        try:
            server.address = await asyncio.wait_for(server._announcement(), PATIENCE)
        except TimeoutError:
            await server.stop()
            raise StartError(f"{Path(command[0]).name}: did not start in {PATIENCE:.0f} s") from None
        except BaseException:
            await server.stop()
            raise
        if not server.address:
            await server.stop()
            raise StartError(f"{Path(command[0]).name}: ended at once: {_last_line(log)}")
        return server

    async def _announcement(self) -> str:
        assert self._process.stdout is not None
        async for line in self._process.stdout:
            _, separator, rest = line.decode(errors="replace").partition(" on ")
            if separator:
                return rest.split()[0]
        return ""

    @property
    def processes(self) -> list[int]:
        """Returns the ids of the process and of all its descendants."""
        children: dict[int, list[int]] = {}
        for path in Path("/proc").iterdir():
            if path.name.isdigit():
                children.setdefault(_parent_of(path), []).append(int(path.name))
        found = [self._process.pid]
        for pid in found:
            found += children.get(pid, [])
        return found

    @property
    def resident(self) -> int:
        """Returns its proportional set size in bytes, over all its processes."""
        return sum(_proportional(pid) for pid in self.processes)

    async def stop(self) -> None:
        """Asks it to end, then kills the remaining processes."""
        started = {pid: _session_of(pid) for pid in self.processes}
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGTERM)
        try:
            await asyncio.wait_for(self._process.wait(), PATIENCE / 6)
        except TimeoutError:
            pass
        finally:
            for pid, session in started.items():
                # The number may belong to another process by now.
                if session and _session_of(pid) == session:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
            await self._process.wait()


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines() or ["no word"]
    return lines[-1][:300]


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("UNROLL_")}


def _parent_of(process: Path) -> int:
    try:
        # Fields after the name, which ends with the last parenthesis: state, parent.
        return int((process / "stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def _session_of(pid: int) -> int:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return 0


def _proportional(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
