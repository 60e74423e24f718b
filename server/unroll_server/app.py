"""Settings -> wiring -> serve: the one place that knows every part."""

import asyncio
import gc
import logging
import os
from collections.abc import Callable, Sequence
from typing import Any, Generic, Protocol, TypeVar

import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from unroll_proto.v1 import unroll_pb2, unroll_pb2_grpc
from unroll_server import metrics
from unroll_server.catalog import Catalog
from unroll_server.config import Settings
from unroll_server.engine import Engine
from unroll_server.fronts.grpcio import GrpcioFront
from unroll_server.handlers.unroll import UnrollService
from unroll_server.interceptors import EndlessCalls, StatusInterceptor
from unroll_server.metrics import Metrics
from unroll_server.models import load_repository
from unroll_server.process import stop_signal

_log = logging.getLogger(__name__)

SERVICE = unroll_pb2.DESCRIPTOR.services_by_name["UnrollService"].full_name
GC_THRESHOLD = (20_000, 20, 20)
"""Objects, and collections of younger ones, between collections. By default it is 700, some ten requests."""
LINGER = 1.0
"""Seconds that a health watcher has to hear that the server drains."""


class Front(Protocol):
    """What carries the servicers to the wire."""

    @property
    def registry(self) -> Any:
        """What the generated `add_...Servicer_to_server` functions take."""

    async def stop(self, grace: float) -> None:
        """Takes no new calls, waits for those in flight, and cancels what is not done after `grace` seconds."""


AnyFront = TypeVar("AnyFront", bound=Front)


class Service(Generic[AnyFront]):
    """Models, engine and servicers on a front. Made on the event loop that it serves on.

    Args:
        settings: What was asked for.
        figures: Where the engine counts.
        make_front: Makes the front, given what stands before every handler.

    Attributes:
        served: The models that are served, by name and version.
        front: The front.

    Raises:
        StartupError: it can't serve as configured.
    """

    def __init__(
        self,
        settings: Settings,
        figures: Metrics,
        make_front: Callable[[Sequence[grpc.aio.ServerInterceptor]], AnyFront],
    ) -> None:
        models = load_repository(settings.models, settings.runtime, settings.device, settings.max_lanes)
        self.served = ", ".join(str(model.spec.key) for model in models)
        self._drain_timeout = settings.drain_timeout
        self._engine = Engine(
            models,
            max_lanes=settings.max_lanes,
            tick_steps=settings.tick_steps,
            max_queued_steps=settings.max_queued_steps,
            metrics=figures,
        )
        self._endless = EndlessCalls(SERVICE)
        self.front = make_front([StatusInterceptor(), self._endless])
        self._service = UnrollService(Catalog(models), self._engine, settings.limits)
        self._checks = health.aio.HealthServicer()
        registry = self.front.registry
        unroll_pb2_grpc.add_UnrollServiceServicer_to_server(self._service, registry)
        health_pb2_grpc.add_HealthServicer_to_server(self._checks, registry)
        reflection.enable_server_reflection([SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME], registry)

    async def open(self) -> None:
        """Says that it serves, to whom asks for its health."""
        # What is loaded stays: the collector need not look at all of it again and again, in the middle of a tick.
        gc.collect()
        gc.freeze()
        gc.set_threshold(*GC_THRESHOLD)
        for name in ("", SERVICE):
            await self._checks.set(name, health_pb2.HealthCheckResponse.SERVING)

    async def drain(self) -> None:
        """Lets calls in flight end and streams end with their snapshots, and takes no others."""
        _log.info("draining")
        await self._checks.enter_graceful_shutdown()
        self._service.drain()
        self._endless.end(LINGER)
        await self.front.stop(self._drain_timeout)

    def close(self) -> None:
        """Ends the engine."""
        self._engine.close()


async def serve(settings: Settings, announce: Callable[[str], None]) -> None:
    """Serves in this process, by grpcio, until SIGTERM or SIGINT; then drains.

    Args:
        settings: What was asked for.
        announce: Told in one line what is served and where, once it is.

    Raises:
        StartupError: it can't start as configured.
    """
    stop = stop_signal()
    figures = Metrics()
    with metrics.served(settings.metrics_address, figures, metrics.Workers(lambda: {0: os.getpid()})):
        await serve_grpcio(
            settings, figures, stop, lambda served, address: announce(settings.announcement(served, address))
        )


async def serve_grpcio(
    settings: Settings,
    figures: Metrics,
    stop: asyncio.Event,
    started: Callable[[str, str], None],
    share_port: bool = False,
) -> None:
    """Serves by grpcio until `stop` is set, then drains.

    Args:
        settings: What was asked for.
        figures: Where the engine counts.
        stop: Ends it.
        started: Told what is served and where, once it is.
        share_port: Whether other processes listen on the same port.

    Raises:
        StartupError: it can't start as configured.
    """
    limit = settings.max_message_bytes
    service = Service(settings, figures, lambda each: GrpcioFront(settings.listen, each, limit, share_port))
    try:
        await service.open()
        started(service.served, await service.front.start())
        await stop.wait()
        await service.drain()
    finally:
        service.close()
