"""The parent of workers: one port, workers started again when they die, all drained together, one sum of metrics."""

import asyncio
import logging
import os
import signal
import socket
import sys
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, ExitStack, nullcontext, suppress
from dataclasses import replace

import click

from unroll_server import metrics
from unroll_server.addresses import joined, reserved
from unroll_server.config import Settings
from unroll_server.control import FD, Channel, Orders, metrics_folder
from unroll_server.errors import StartupError
from unroll_server.metrics import Metrics
from unroll_server.private_folder import private_folder
from unroll_server.process import Stop
from unroll_server.relay import GoneError, Questions
from unroll_server.sessions.opening import shared_store
from unroll_server.stopping import SIGNALS
from unroll_server.transport.tls import Certificates

_log = logging.getLogger(__name__)

FIRST_DELAY = 0.25
"""Seconds until a dead worker is started again; twice as long after each death in a row, to LONGEST_DELAY."""
LONGEST_DELAY = 30.0
GOOD_LIFE = 60.0
"""Seconds of serving after which a death counts as the first one."""
ASKED = {0, *(-number for number in SIGNALS)}
"""How a worker ends that was asked to: drained, or by a signal before it could handle one."""
PATIENCE = 5.0
"""Seconds beyond the drain timeout after which a worker that does not end is ended."""


async def serve(settings: Settings, announce: Callable[[str], None]) -> None:
    """Serves from `settings.workers` processes until SIGTERM or SIGINT drains them.

    Args:
        settings: What was asked for.
        announce: Told in one line what is served and where, once every worker serves.

    Raises:
        StartupError: the workers can't start as configured.
        ClickException: a worker could not be drained.
    """
    stop = Stop()
    stop.drain_on_signals()
    async with AsyncExitStack() as stack:
        folder = stack.enter_context(private_folder())
        metrics_folder(folder).mkdir()
        _, port = stack.enter_context(reserved(settings.listen_address))
        address = joined(settings.listen_address.host, port)
        settings = replace(settings, listen=address)
        settings, sessions = shared_store(settings, folder)
        # Each worker reads them itself; what is wrong with them ends the start here.
        Certificates.of(settings)
        every = [Orders(replace(settings, admin=None), number, folder) for number in range(settings.workers)]
        workers = [_Worker(orders) for orders in every]
        processes = metrics.Workers(
            lambda: {worker.number: worker.pid for worker in workers if worker.pid is not None},
            lambda: sum(worker.restarts for worker in workers),
            lambda: sum(worker.serves for worker in workers),
        )
        # One that starts has not yet forgotten how things were with the one whose place it takes.
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
            keeping: list[asyncio.Task[None]] = []
            if started.done():
                served = started.result()
                if sessions:
                    sessions.keep()
                announce(settings.announcement(served, address))
                keeping += [asyncio.create_task(worker.keep()) for worker in workers]
                await stopped
            _log.info("draining %d workers", len(workers))
            # Those that have started already take calls while others start.
            for task in (started, *keeping):
                task.cancel()
            await asyncio.gather(started, *keeping, return_exceptions=True)
            drained = await asyncio.gather(*(worker.drain() for worker in workers))
            if sessions:
                await sessions.close()
            if not all(drained):
                raise click.ClickException("not every worker has drained; the log says why")
        finally:
            stopped.cancel()
            started.cancel()
            await asyncio.gather(started, return_exceptions=True)
            await asyncio.gather(*(worker.kill() for worker in workers))


def _administered(settings: Settings, workers: "Sequence[_Worker]") -> AbstractAsyncContextManager[None]:
    if settings.admin is None:
        return nullcontext()
    # Not before: without it this process needs no gRPC.
    from unroll_server.admin.listener import AdminListener
    from unroll_server.identities import Identities

    listener = AdminListener(settings, Identities(settings.tokens), [worker.ask for worker in workers])
    for worker in workers:
        worker.restarted = listener.catch_up
    return listener.serving()


async def _start_all(workers: "Sequence[_Worker]") -> str:
    # One after the other: each measures how fast its models run, which the others would disturb.
    served = [await worker.start() for worker in workers]
    return served[0]


class _Worker:
    """A place among the workers, and the process that holds it."""

    def __init__(self, orders: Orders) -> None:
        self.number = orders.worker
        self.restarts = 0
        self._orders = orders
        self._command = [sys.executable, "-m", "unroll_server.worker"]
        self._process: asyncio.subprocess.Process | None = None
        self._channel: Channel | None = None
        self._questions: Questions | None = None
        self.restarted: Callable[[int], Awaitable[None]] | None = None

    @property
    def pid(self) -> int | None:
        """The process id; None while there is no process."""
        return self._process.pid if self._process and self._process.returncode is None else None

    @property
    def serves(self) -> bool:
        """Whether the process lives and has said that it serves."""
        return self._questions is not None and self.pid is not None

    async def start(self) -> str:
        """Starts the process and returns what it serves, once it does.

        A process that a signal of others ends meanwhile is started again.

        Raises:
            StartupError: it can't.
        """
        while (served := await self._start_once()) is None:
            _log.info("worker %d was stopped while it started; starting it again", self.number)
        return served

    async def _start_once(self) -> str | None:
        """See start; None where the process was asked to end."""
        self._hang_up()
        try:
            ours = await self._spawn()
        except OSError as error:
            # No descriptor, process or memory to be had, which may be what ended the one before.
            raise StartupError(f"a worker can't be started: {error.strerror or error}") from None
        self._channel = await Channel.on(ours)
        self._channel.send(**self._orders.to_message())
        answer = await self._channel.receive()
        if answer and "serving" in answer:
            self._questions = Questions(self._channel)
            return str(answer["serving"])
        if answer is None and await self._process_ended() in ASKED:
            return None
        await self.kill()
        raise StartupError(str(answer["failed"]) if answer else "a worker ended while it started; its log says why")

    async def _process_ended(self) -> int | None:
        """The exit code of a process that has closed its channel; None where it does not end."""
        assert self._process is not None
        with suppress(TimeoutError):
            async with asyncio.timeout(PATIENCE):
                return await self._process.wait()
        return None

    async def _spawn(self) -> socket.socket:
        """Starts the process, and returns this end of what is said to it."""
        ours, theirs = socket.socketpair()
        with theirs, ExitStack() as failed:
            failed.callback(ours.close)
            # In a session of its own: a terminal's Ctrl-C is for the supervisor alone. Nor is a worker's standard
            # output the supervisor's, which says one line.
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
        """Starts the process again whenever it ends, until cancelled; at once where it was asked to end by others."""
        delay = FIRST_DELAY
        loop = asyncio.get_running_loop()
        while True:
            assert self._process is not None
            since = loop.time()
            code = await self._process.wait()
            if loop.time() - since > GOOD_LIFE:
                delay = FIRST_DELAY
            asked = code in ASKED
            while True:
                if asked:
                    _log.info("worker %d was stopped, though not by its supervisor; starting it again", self.number)
                    asked = False
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
        """Lets the process end once its calls have; False where it did not, or not well."""
        if self._process is None or self._process.returncode is not None:
            return True
        starting = self._questions is None
        if starting or self._channel is None:
            # It starts: the signal ends it at once, or drains it if it has just begun to serve.
            with suppress(ProcessLookupError):
                os.kill(self._process.pid, signal.SIGTERM)
        else:
            self._channel.send(drain=True)
        try:
            async with asyncio.timeout(self._orders.settings.drain_timeout + PATIENCE):
                code = await self._process.wait()
        except TimeoutError:
            _log.error("worker %d did not end in time", self.number)
            return False
        if starting or code in ASKED:
            return True
        _log.error("worker %d ended with %d", self.number, code)
        return False

    async def ask(self, method: str, request: bytes) -> bytes:
        """See relay.Ask."""
        if self._questions is None:
            raise GoneError
        return await self._questions.ask(method, request)

    def _hang_up(self) -> None:
        if self._questions is not None:
            self._questions.close()
            self._questions = None
        if self._channel is not None:
            self._channel.close()
            self._channel = None

    async def kill(self) -> None:
        """Ends the process, if there is one, at once."""
        self._hang_up()
        if self._process is not None:
            if self._process.returncode is None:
                # Popen's own kill would first look whether it has ended, and so take its exit code from asyncio.
                with suppress(ProcessLookupError):
                    os.kill(self._process.pid, signal.SIGKILL)
            await self._process.wait()
