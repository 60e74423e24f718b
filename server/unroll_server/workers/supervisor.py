"""Parent of the workers: reserves their port, starts them again when they end, drains them, sums up their metrics."""

import asyncio
import logging
import os
import signal
import socket
import sys
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, ExitStack, nullcontext, suppress

from unroll_server.addresses import joined, reserved
from unroll_server.config import Settings
from unroll_server.errors import StartupError, UndrainedError
from unroll_server.process import Stop
from unroll_server.sessions.factory import open_shared_store
from unroll_server.stopping import SIGNALS
from unroll_server.telemetry import metrics
from unroll_server.telemetry.metrics import Metrics
from unroll_server.transport.tls import Certificates
from unroll_server.workers.channel import FD, Channel, WorkerConfig, metrics_folder
from unroll_server.workers.rpc import GoneError, Questions
from unroll_server.workers.runtime_dir import private_folder

_log = logging.getLogger(__name__)

FIRST_DELAY = 0.25
"""Seconds until a crashed worker is started again; doubled after each crash in a row, up to LONGEST_DELAY."""
LONGEST_DELAY = 30.0
GOOD_LIFE = 60.0
"""Seconds of serving after which a crash counts as the first in a row."""
DRAINED = 0
UNDRAINED = 1
STOPPED_EARLY = {DRAINED, *(-number for number in SIGNALS)}
"""Exit codes of a worker that a signal ended while it started; negative if its handlers were not installed yet."""
KILL_AFTER = 5.0
"""Seconds beyond the drain timeout after which a worker that has not ended is killed."""


async def serve(settings: Settings, announce: Callable[[str], None]) -> None:
    """Serves from `settings.workers` processes until SIGTERM or SIGINT drains them.

    Args:
        settings: Settings of the server.
        announce: Called once every worker serves, with one line: the models and the address.

    Raises:
        StartupError: the workers can't start as configured.
        SessionsLostError: the sessions can't be saved.
        UndrainedError: a worker did not drain.
    """
    stop = Stop()
    stop.drain_on_signals()
    async with AsyncExitStack() as stack:
        folder = stack.enter_context(private_folder())
        metrics_folder(folder).mkdir()
        _, port = stack.enter_context(reserved(settings.listen_address))
        address = joined(settings.listen_address.host, port)
        settings = settings.replace(listen=address)
        settings, sessions = open_shared_store(settings, folder)
        # Each worker reads them itself; faults in them are reported here, once.
        Certificates.of(settings)
        worker_settings = settings.replace(admin=None)
        workers = [_Worker(WorkerConfig(worker_settings, number, folder)) for number in range(settings.workers)]
        processes = metrics.Workers(
            lambda: {worker.number: worker.pid for worker in workers if worker.pid is not None},
            lambda: sum(worker.restarts for worker in workers),
            lambda: sum(worker.serves for worker in workers),
        )
        # The figures of a worker that starts are still those of the process before it.
        figures = Metrics(
            metrics_folder(folder),
            living=lambda: [worker.number for worker in workers if worker.serves],
        )
        stack.enter_context(metrics.served(settings.metrics_address, figures, processes))
        await stack.enter_async_context(_administered(settings, workers))
        stopped = asyncio.create_task(stop.wait())
        started = asyncio.create_task(_start_all(workers))
        try:
            await asyncio.wait({started, stopped}, return_when=asyncio.FIRST_COMPLETED)
            failure = started.exception() if started.done() else None
            keeping: list[asyncio.Task[None]] = []
            if started.done() and failure is None:
                if sessions:
                    sessions.confirm_takeover()
                announce(settings.announcement(started.result(), address))
                keeping += [asyncio.create_task(worker.keep()) for worker in workers]
                await stopped
            if failure is None:
                _log.info("draining %d workers", len(workers))
            for task in (started, *keeping):
                task.cancel()
            await asyncio.gather(started, *keeping, return_exceptions=True)
            # Also if some have not started: the others take calls already.
            drained = await asyncio.gather(*(worker.drain() for worker in workers))
            if sessions:
                await sessions.close()
            if failure:
                raise failure
            if not all(drained):
                raise UndrainedError("not every worker has drained; the log has the causes")
        finally:
            stopped.cancel()
            started.cancel()
            await asyncio.gather(started, return_exceptions=True)
            await asyncio.gather(*(worker.kill() for worker in workers))


def _administered(settings: Settings, workers: "Sequence[_Worker]") -> AbstractAsyncContextManager[None]:
    if settings.admin is None:
        return nullcontext()
    # This process imports gRPC for the admin listener only.
    from unroll_server.admin.listener import AdminListener
    from unroll_server.identity.tokens import Identities

    listener = AdminListener(settings, Identities(settings.tokens), [worker.ask for worker in workers])
    for worker in workers:
        worker.restarted = listener.catch_up
    return listener.serving()


async def _start_all(workers: "Sequence[_Worker]") -> str:
    # One by one: each measures how fast its models run.
    served = [await worker.start() for worker in workers]
    return served[0]


class _Worker:
    """A worker with a number, and the process that currently runs it."""

    def __init__(self, config: WorkerConfig) -> None:
        self.number = config.worker
        self.restarts = 0
        self._config = config
        self._command = [sys.executable, "-m", "unroll_server.workers.worker"]
        self._process: asyncio.subprocess.Process | None = None
        self._channel: Channel | None = None
        self._questions: Questions | None = None
        self.restarted: Callable[[int], Awaitable[None]] | None = None

    @property
    def pid(self) -> int | None:
        """The process id; None if no process runs."""
        return self._process.pid if self._process and self._process.returncode is None else None

    @property
    def serves(self) -> bool:
        """True if the process runs and has reported that it serves."""
        return self._questions is not None and self.pid is not None

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
        self._close_channel()
        try:
            ours = await self._spawn()
        except OSError as error:
            # Descriptors, processes or memory ran out, which may have ended the process before this one too.
            raise StartupError(f"a worker can't be started: {error.strerror or error}") from None
        self._channel = await Channel.on(ours)
        self._channel.send(**self._config.to_message())
        answer = await self._channel.receive()
        if answer and "serving" in answer:
            self._questions = Questions(self._channel)
            return str(answer["serving"])
        if answer is None and await self._exit_code() in STOPPED_EARLY:
            return None
        await self.kill()
        raise StartupError(str(answer["failed"]) if answer else "a worker ended while it started; its log says why")

    async def _exit_code(self) -> int | None:
        """Waits for the end of a process that has closed its channel; returns None if it does not end."""
        assert self._process is not None
        with suppress(TimeoutError):
            async with asyncio.timeout(KILL_AFTER):
                return await self._process.wait()
        return None

    async def _spawn(self) -> socket.socket:
        """Starts the process; returns this end of the socket to it."""
        ours, theirs = socket.socketpair()
        with theirs, ExitStack() as failed:
            failed.callback(ours.close)
            # In a session of its own, so that a terminal's Ctrl-C reaches the supervisor alone. Standard output is for
            # the supervisor's one line.
            self._process = await asyncio.create_subprocess_exec(
                *self._command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=sys.stderr.fileno(),
                env={**os.environ, FD: str(theirs.fileno())},
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
            failed.pop_all()
        return ours

    async def keep(self) -> None:
        """Starts the process again whenever it ends, until cancelled.

        At once if it has drained, which a signal from outside asked for; after a delay if it crashed.
        """
        delay = FIRST_DELAY
        loop = asyncio.get_running_loop()
        while True:
            assert self._process is not None
            since = loop.time()
            code = await self._process.wait()
            if loop.time() - since > GOOD_LIFE:
                delay = FIRST_DELAY
            drained = code == DRAINED
            while True:
                if drained:
                    _log.info("worker %d was stopped, though not by its supervisor; starting it again", self.number)
                    drained = False
                else:
                    _log.error("worker %d ended with %d; starting it again in %g s", self.number, code, delay)
                    await asyncio.sleep(delay)
                    delay = min(2 * delay, LONGEST_DELAY)
                self.restarts += 1
                try:
                    await self.start()
                    if self.restarted:
                        await self.restarted(self.number)
                    break
                except StartupError as error:
                    _log.error("worker %d can't start: %s", self.number, error)
                    code = self._process.returncode or 0

    async def drain(self) -> bool:
        """Lets the process end once its calls have; returns False if it lost some, or had to be killed."""
        if self._process is None:
            return True
        served = self.serves
        if served:
            assert self._channel is not None
            self._channel.send(drain=True)
        elif self._process.returncode is None:
            # It starts: the signal ends it at once, or drains it if it has just begun to serve.
            with suppress(ProcessLookupError):
                os.kill(self._process.pid, signal.SIGTERM)
        try:
            async with asyncio.timeout(self._config.settings.drain_timeout + KILL_AFTER):
                code = await self._process.wait()
        except TimeoutError:
            _log.error("worker %d did not end in time", self.number)
            # Before the sessions are saved, which it could still change.
            await self.kill()
            return False
        # A crash before the stop was logged at its time.
        if code == DRAINED or not (served or code == UNDRAINED):
            return True
        _log.error("worker %d ended with %d", self.number, code)
        return False

    async def ask(self, method: str, request: bytes) -> bytes:
        """See relay.Ask."""
        if self._questions is None:
            raise GoneError
        return await self._questions.ask(method, request)

    def _close_channel(self) -> None:
        if self._questions is not None:
            self._questions.close()
            self._questions = None
        if self._channel is not None:
            self._channel.close()
            self._channel = None

    async def kill(self) -> None:
        """Kills the process if it runs."""
        self._close_channel()
        if self._process is not None:
            if self._process.returncode is None:
                # Popen's own kill polls the process first, and so takes its exit code from asyncio.
                with suppress(ProcessLookupError):
                    os.kill(self._process.pid, signal.SIGKILL)
            await self._process.wait()
