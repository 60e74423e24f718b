"""The supervisor's handle of a worker: starts its process, restarts it when it ends, drains it, kills it."""

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress

from unroll_server.errors import StartupError
from unroll_server.stopping import SIGNALS
from unroll_server.workers.protocol import DRAINED, END, MAX_REPORT_BYTES, UNDRAINED, Report
from unroll_server.workers.runtime_dir import RuntimeDir

_log = logging.getLogger(__name__)

FIRST_DELAY = 0.25
"""Seconds until a crashed worker is restarted; doubled after each crash in a row, up to MAX_DELAY."""
MAX_DELAY = 30.0
STABLE_SECONDS = 60.0
"""Seconds of serving after which a crash counts as the first in a row."""
KILL_AFTER = 5.0
"""Seconds beyond the drain timeout after which a worker that has not ended is killed."""
STOPPED_EARLY = {DRAINED, *(-number for number in SIGNALS)}
"""Exit codes of a worker that a signal ended while it started; negative if its handlers were not installed yet."""


async def _ignore(worker: int) -> None:
    """Ignores a restarted worker."""


class WorkerProcess:
    """A worker with a number, and the process that currently runs it.

    Args:
        number: Number of the worker, from 0.
        runtime_dir: Runtime directory of the supervisor.
        drain_timeout: Seconds that the worker gives calls in flight to end.
        command: Command that runs a worker, without its arguments.

    Attributes:
        number: Number of the worker.
        restarts: Number of times that the process was restarted.
        on_restart: Called with the number of the worker when a restarted process serves.
    """

    def __init__(
        self,
        number: int,
        runtime_dir: RuntimeDir,
        drain_timeout: float,
        command: Sequence[str] = (sys.executable, "-m", "unroll_server.workers.worker"),
    ) -> None:
        self.number = number
        self.restarts = 0
        self.on_restart: Callable[[int], Awaitable[None]] = _ignore
        self._command = (*command, str(runtime_dir.path), str(number))
        self._drain_timeout = drain_timeout
        self._process: asyncio.subprocess.Process | None = None
        self._reported = False

    @property
    def pid(self) -> int | None:
        """The process id; None if no process runs."""
        return self._process.pid if self._process and self._process.returncode is None else None

    @property
    def serves(self) -> bool:
        """True if the process runs and has reported that it serves."""
        return self._reported and self.pid is not None

    async def start(self) -> str:
        """Starts the process, waits until it serves, and returns the models that it serves.

        A process that an outside signal ends meanwhile is started again.

        Raises:
            StartupError: it can't serve.
        """
        while (served := await self._start_once()) is None:
            _log.info("worker %d was stopped while it started; starting it again", self.number)
        return served

    async def _start_once(self) -> str | None:
        """Like `start`; returns None if a signal ended the process."""
        self._reported = False
        try:
            # In its own session, so that a terminal's Ctrl-C reaches only the supervisor.
            self._process = await asyncio.create_subprocess_exec(
                *self._command,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                start_new_session=True,
                limit=MAX_REPORT_BYTES,
            )
        except OSError as error:
            # Descriptors, processes or memory ran out, which may also have ended the previous process.
            raise StartupError(f"a worker can't be started: {error.strerror or error}") from None
        assert self._process.stdout is not None
        with suppress(asyncio.IncompleteReadError):
            report = Report.decode(await self._process.stdout.readuntil(END))
            if report.serves:
                self._reported = True
                return report.text
            await self.kill()
            raise StartupError(report.text)
        # The pipe is closed, but the process may have yet to end.
        with suppress(TimeoutError):
            async with asyncio.timeout(KILL_AFTER):
                if await self._process.wait() in STOPPED_EARLY:
                    return None
        await self.kill()
        raise StartupError("a worker ended while it started; its log has the cause")

    async def keep(self) -> None:
        """Restarts the process whenever it ends, until cancelled.

        Restarts at once after a drain, which an outside signal caused; after a delay if it crashed.
        """
        delay = FIRST_DELAY
        loop = asyncio.get_running_loop()
        while True:
            assert self._process is not None
            since = loop.time()
            code = await self._process.wait()
            if loop.time() - since > STABLE_SECONDS:
                delay = FIRST_DELAY
            if code == DRAINED:
                _log.info("worker %d drained on a signal from outside; starting it again", self.number)
                if await self._restart():
                    continue
                code = self._process.returncode or 0
            while True:
                _log.error("worker %d ended with %d; starting it again in %g s", self.number, code, delay)
                await asyncio.sleep(delay)
                delay = min(2 * delay, MAX_DELAY)
                if await self._restart():
                    break
                code = self._process.returncode or 0

    async def _restart(self) -> bool:
        """Starts the process again; returns False if it can't serve, after logging the reason."""
        self.restarts += 1
        try:
            await self.start()
        except StartupError as error:
            _log.error("worker %d can't start: %s", self.number, error)
            return False
        await self.on_restart(self.number)
        return True

    async def drain(self) -> bool:
        """Drains the process; returns False if it lost calls or had to be killed.

        A process that crashed before counts as drained: its crash was logged, and no call is lost to this drain.
        """
        if self._process is None:
            return True
        served = self.serves
        self._signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(self._drain_timeout + KILL_AFTER):
                code = await self._process.wait()
        except TimeoutError:
            _log.error("worker %d did not end in time", self.number)
            # Before the sessions are saved, which the process could still change.
            await self.kill()
            return False
        # A process that had ended UNDRAINED lost calls to a signal that belongs to the same stop.
        if code == DRAINED or not (served or code == UNDRAINED):
            return True
        _log.error("worker %d ended with %d", self.number, code)
        return False

    async def kill(self) -> None:
        """Kills the process if it runs."""
        self._signal(signal.SIGKILL)
        if self._process is not None:
            await self._process.wait()

    def _signal(self, number: signal.Signals) -> None:
        # Popen's own method polls the process first, which would take its exit code from asyncio.
        if (pid := self.pid) is not None:
            with suppress(ProcessLookupError):
                os.kill(pid, number)
