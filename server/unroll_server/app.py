"""Builds the parts of a serving process from its settings, serves, and drains. Only this module knows every part."""

import asyncio
import gc
import logging
import os
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, nullcontext
from pathlib import Path
from typing import Any

from grpc_health.v1 import health_pb2_grpc

from unroll_engine.async_engine import AsyncEngine
from unroll_engine.core import usable_cores
from unroll_engine.errors import RuntimeUnavailableError
from unroll_engine.models.loader import Loader
from unroll_proto.inference import service_pb2_grpc
from unroll_proto.v1 import unroll_pb2, unroll_pb2_grpc
from unroll_server.admin.service import AdminService
from unroll_server.api import health
from unroll_server.api.data_plane import DataPlane
from unroll_server.api.health import Health
from unroll_server.api.native.service import UnrollService
from unroll_server.api.oip import service as inference
from unroll_server.api.oip.infer import Inference
from unroll_server.api.oip.service import InferenceService
from unroll_server.api.oip.statistics import Statistics
from unroll_server.api.reflection import add_reflection
from unroll_server.config import Settings
from unroll_server.errors import StartupError, UndrainedError
from unroll_server.identity.quotas import Quotas
from unroll_server.identity.tokens import Identities
from unroll_server.middleware import Middleware
from unroll_server.middleware.access_log import CallObserver
from unroll_server.middleware.auth import AuthMiddleware
from unroll_server.middleware.drain_streams import DrainStreams
from unroll_server.middleware.slow_readers import SlowReaders
from unroll_server.process import Stop
from unroll_server.repository.catalog import Catalog
from unroll_server.repository.mirror import SEPARATOR, Mirror
from unroll_server.repository.repository import Repository
from unroll_server.repository.watcher import Watcher
from unroll_server.sessions.factory import open_store
from unroll_server.sessions.service import Sessions
from unroll_server.telemetry import metrics
from unroll_server.telemetry.metrics import Metrics
from unroll_server.telemetry.tracing import Tracer
from unroll_server.transport import Transport, native
from unroll_server.transport.choice import make_transport
from unroll_server.transport.registry import Guard, Registry, Work

_log = logging.getLogger(__name__)

SERVICE = unroll_pb2.DESCRIPTOR.services_by_name["UnrollService"].full_name
SERVICES = (SERVICE, inference.SERVICE)
WORKING = {
    f"/{SERVICE}/Classify": Work(interactive=False),
    f"/{SERVICE}/Advance": Work(interactive=True),
    # With this parameter, a call may be a step of a sequence.
    f"/{inference.SERVICE}/ModelInfer": Work(interactive=False, step_mark=b"sequence_id"),
}
"""Unary methods that give the engine work."""
PROBES = {
    f"/{health.SERVICE}/Check",
    *(f"/{inference.SERVICE}/{name}" for name in ("ServerLive", "ServerReady", "ModelReady")),
}
"""Unary methods that a draining server still answers."""
GC_THRESHOLD = (20_000, 20, 20)
"""Thresholds of the garbage collector. By default it runs every 700 objects, which is about ten requests."""
TASK_COUNT_INTERVAL = 2.0
"""Seconds between counts of the event loop's tasks."""
HALF_CLOSE_TIMEOUT = 1.0
"""Seconds that a draining server gives callers to read the last message of a stream; at most half the drain timeout."""


class Service:
    """Models, engine and servicers on a transport. Created and used on one event loop.

    Args:
        settings: Settings of the server.
        figures: Metrics of this process.
        make_transport: Makes the transport that serves the methods of a registry.
        make_quotas: Makes the quotas of the identities.

    Attributes:
        observer: Counts, logs and traces every call.
        admin: Servicer of unroll.v1.AdminService.
        identities: The known identities.
        transport: The transport.
        sessions: The sessions.

    Raises:
        StartupError: it can't serve as configured.
    """

    def __init__(
        self,
        settings: Settings,
        figures: Metrics,
        make_transport: Callable[[Registry], Transport],
        make_quotas: Callable[[Identities], Quotas] = Quotas,
    ) -> None:
        self._figures = figures
        self.observer = CallObserver(figures, settings.access_log, Tracer.configured())
        self.identities = Identities(settings.tokens)
        quotas = make_quotas(self.identities)
        self._auth = AuthMiddleware(self.identities, quotas)
        self._watching: asyncio.Task[None] | None = None
        self._drain_timeout = settings.drain_timeout
        self._engine = AsyncEngine(
            (),
            max_lanes=settings.tuning.max_lanes,
            tick_steps=settings.tuning.tick_steps,
            max_queued_steps=settings.tuning.max_queued_steps,
            max_queued_bytes=settings.tuning.max_queued_bytes,
            threads=settings.threads or max(1, usable_cores() // settings.workers),
            metrics=figures,
            quota_of=quotas.queued_steps if settings.tokens else None,
        )
        self._catalog = Catalog(metrics=figures)
        store = open_store(settings, figures.server.session)
        remote = SEPARATOR in settings.models
        self._repository = Repository(
            Mirror(settings.models, settings.models_cache) if remote else Path(settings.models),
            _loader(settings),
            self._catalog,
            self._engine,
            figures,
            count_sessions=store.count,
            on_change=self._report_health,
            keep=settings.versions_kept,
            # By its second look every worker has retired a version whose files are gone.
            drain_at_least=2 * settings.models_poll + 1 if settings.workers > 1 else 0.0,
        )
        self._watcher = Watcher(self._repository, self._catalog, settings.models_poll)
        self._drain_streams = DrainStreams(*SERVICES)
        # Without identities, no call pays for authentication.
        middleware: list[Middleware] = [self._auth] if settings.tokens or settings.tls_client_ca else []
        registry: Any = Registry(
            self.observer,
            [*middleware, self._drain_streams],
            SlowReaders(figures),
            Guard(self._engine.admission, WORKING, PROBES),
        )
        self.transport = make_transport(registry)
        self.sessions = Sessions(
            store,
            self._catalog,
            self._engine,
            figures.server.session,
            quotas,
            self._repository.refresh_for,
        )
        self.admin = AdminService(self._repository, self.sessions)
        plane = DataPlane(self._catalog, self._engine, self.sessions, settings.limits)
        self._service = UnrollService(plane, quotas)
        self._inference = InferenceService(
            self._catalog, Inference(plane, Statistics(figures.memory)), self._repository.index
        )
        self._checks = Health()
        # Names that were ever SERVING.
        self._reported: set[str] = set()
        unroll_pb2_grpc.add_UnrollServiceServicer_to_server(self._service, registry)
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(self._inference, registry)
        health_pb2_grpc.add_HealthServicer_to_server(self._checks, registry)
        add_reflection([*SERVICES, health.SERVICE], registry)

    async def open(self) -> None:
        """Loads the models, and reports SERVING to health checks.

        Raises:
            StartupError: nothing can be served.
        """
        try:
            await self._repository.open()
        except RuntimeUnavailableError as error:
            raise StartupError(f"--{error}") from None
        self._watcher.start()
        self._watching = asyncio.create_task(self._auth.watch())
        self._count_tasks()
        # Loaded objects stay: frozen, they are not visited by a collection in the middle of a tick.
        gc.collect()
        gc.freeze()
        gc.set_threshold(*GC_THRESHOLD)
        self._checks.set(dict.fromkeys(("", *SERVICES), True))

    def _count_tasks(self) -> None:
        loop = asyncio.get_running_loop()
        self._figures.server.tasks(len(asyncio.all_tasks(loop)))
        loop.call_later(TASK_COUNT_INTERVAL, self._count_tasks)

    @property
    def served(self) -> str:
        """The served versions, NAME/VERSION, separated by commas."""
        return ", ".join(str(model.spec.key) for model in self._catalog.models)

    async def _report_health(self) -> None:
        """Sets the health of each model, by NAME and by NAME/VERSION: SERVING if it takes new work."""
        served = {model.spec.key for model in self._catalog.models}
        names = {str(key) for key in served} | {key.name for key in served}
        self._checks.set({name: name in names for name in sorted(names | self._reported)})
        self._reported = names

    async def drain(self) -> None:
        """Refuses new calls, and waits for those in flight and for streams to end with their snapshots.

        Raises:
            UndrainedError: calls did not end within the drain timeout.
        """
        _log.info("draining")
        self._checks.end()
        half_close_timeout = min(HALF_CLOSE_TIMEOUT, self._drain_timeout / 2)
        self._service.drain(half_close_timeout)
        self._inference.drain(half_close_timeout)
        self._drain_streams.end(half_close_timeout)
        drained = await self.transport.stop(self._drain_timeout)
        await self.sessions.close()
        if not drained:
            raise UndrainedError(f"cancelled the calls that had not ended in --drain-timeout {self._drain_timeout:g} s")

    def close(self) -> None:
        """Ends the engine and the background tasks."""
        self._watcher.close()
        self._repository.close()
        if self._watching:
            self._watching.cancel()
        self._engine.close()
        self.observer.close()


async def serve(settings: Settings, announce: Callable[[str], None]) -> None:
    """Serves in this process until SIGTERM or SIGINT, then drains. An earlier signal ends the process at once.

    Args:
        settings: Settings of the server.
        announce: Called once it serves, with one line: the models and the address.

    Raises:
        StartupError: it can't start as configured.
        UndrainedError: see `Service.drain`.
    """
    figures = Metrics()
    with metrics.served(settings.metrics_address, figures, metrics.Workers(lambda: {0: os.getpid()})):
        await serve_until_stopped(
            settings,
            figures,
            Stop(),
            lambda service, address: announce(settings.announcement(service.served, address)),
        )


def _administered(settings: Settings, service: Service) -> AbstractAsyncContextManager[None]:
    if settings.admin is None:
        return nullcontext()
    from unroll_server.admin.channelz import Channelz
    from unroll_server.admin.listener import AdminListener

    # Only the supervisor reaches a worker's private socket.
    identities = service.identities if settings.workers == 1 else None
    return AdminListener(settings, service.admin, Channelz(), identities).serving()


async def serve_until_stopped(
    settings: Settings,
    figures: Metrics,
    stop: Stop,
    started: Callable[[Service, str], None],
    make_quotas: Callable[[Identities], Quotas] = Quotas,
) -> None:
    """Serves until `stop` is set, then drains. With several workers, this process is one of them.

    Args:
        settings: Settings of the server.
        figures: Metrics of this process.
        stop: Request to stop; set by signals once it serves.
        started: Called once it serves, with the service and its address.
        make_quotas: See `Service`.

    Raises:
        StartupError: it can't start as configured.
        UndrainedError: see `Service.drain`.
    """
    share_port = settings.workers > 1
    service = Service(settings, figures, lambda registry: make_transport(settings, registry, share_port), make_quotas)
    try:
        if not share_port:
            # Checked before the models are loaded, which can take minutes.
            for checked in filter(None, (settings.listen_address, settings.admin_address)):
                checked.check()
        await service.open()
        stop.drain_on_signals()
        async with _administered(settings, service):
            address = await service.transport.start()
            name = service.transport.name
            if settings.transport == "auto" and (reason := native.unavailable_reason()):
                name += f" (native: {reason})"
            loop = type(asyncio.get_running_loop()).__module__.partition(".")[0]
            _log.info("transport: %s, on the event loop of %s", name, loop)
            service.sessions.store.confirm_takeover()
            started(service, address)
            await stop.wait()
            await service.drain()
    finally:
        service.close()


def _loader(settings: Settings) -> Loader:
    try:
        return Loader(settings.runtime, settings.device, settings.tuning.max_lanes)
    except RuntimeUnavailableError as error:
        raise StartupError(f"--{error}") from None
