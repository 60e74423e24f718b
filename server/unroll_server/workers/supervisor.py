"""The supervisor of workers: reserves their port, restarts them when they end, drains them, sums their metrics."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager

from unroll_server.addresses import UNIX, Address, joined, reserved
from unroll_server.config import Settings
from unroll_server.errors import UndrainedError
from unroll_server.process import Stop
from unroll_server.sessions.factory import open_shared_store
from unroll_server.telemetry import metrics
from unroll_server.telemetry.metrics import Metrics
from unroll_server.transport.tls import Certificates
from unroll_server.workers.runtime_dir import RuntimeDir, runtime_dir
from unroll_server.workers.worker_process import WorkerProcess

_log = logging.getLogger(__name__)


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
        shared = stack.enter_context(runtime_dir())
        shared.metrics.mkdir()
        _, port = stack.enter_context(reserved(settings.listen_address))
        address = joined(settings.listen_address.host, port)
        settings = settings.replace(listen=address)
        settings, sessions = open_shared_store(settings, shared.path)
        # Each worker reads them itself; errors in them are reported here, once.
        Certificates.of(settings)
        shared.settings.write_text(settings.to_json())
        workers = [WorkerProcess(number, shared, settings.drain_timeout) for number in range(settings.workers)]
        processes = metrics.Workers(
            lambda: {worker.number: worker.pid for worker in workers if worker.pid is not None},
            lambda: sum(worker.restarts for worker in workers),
            lambda: sum(worker.serves for worker in workers),
        )
        # A starting worker's figures are still those of the previous process.
        figures = Metrics(
            shared.metrics,
            living=lambda: [worker.number for worker in workers if worker.serves],
        )
        stack.enter_context(metrics.served(settings.metrics_address, figures, processes))
        await stack.enter_async_context(_administered(settings, workers, shared))
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
            # Even if some have not started: the others already accept calls.
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


@asynccontextmanager
async def _administered(
    settings: Settings, workers: Sequence[WorkerProcess], shared: RuntimeDir
) -> AsyncIterator[None]:
    if settings.admin is None:
        yield
        return
    # The supervisor imports gRPC for the admin listener only.
    from unroll_server.admin.channelz import MergedChannelz
    from unroll_server.admin.fan_out import MergedAdminService, Workers
    from unroll_server.admin.listener import AdminListener
    from unroll_server.identity.tokens import Identities

    sockets = [shared.admin_socket(worker.number) for worker in workers]
    for socket in sockets:
        Address.of("TMPDIR", f"{UNIX}{socket}")
    async with aclosing(Workers(sockets)) as called:
        admin = MergedAdminService(called)
        for worker in workers:
            worker.on_restart = admin.catch_up
        async with AdminListener(settings, admin, MergedChannelz(called), Identities(settings.tokens)).serving():
            yield


async def _start_all(workers: Sequence[WorkerProcess]) -> str:
    # One by one, since each measures the speed of its models.
    served = [await worker.start() for worker in workers]
    return served[0]
