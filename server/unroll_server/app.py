"""Settings -> wiring -> serve: the one place that knows every part."""

import asyncio
import logging
import signal
from collections.abc import Callable

from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from unroll_proto.v1 import unroll_pb2, unroll_pb2_grpc
from unroll_server.catalog import Catalog
from unroll_server.config import Settings
from unroll_server.engine import Engine
from unroll_server.fronts.grpcio import GrpcioFront
from unroll_server.handlers.unroll import UnrollService
from unroll_server.interceptors import EndlessCalls, StatusInterceptor
from unroll_server.models import load_repository

_log = logging.getLogger(__name__)

SERVICE = unroll_pb2.DESCRIPTOR.services_by_name["UnrollService"].full_name
LINGER = 1.0
"""Seconds that a health watcher has to hear that the server drains."""


async def serve(settings: Settings, announce: Callable[[str], None]) -> None:
    """Serves until SIGTERM or SIGINT, then drains: calls in flight end, streams end with their snapshots.

    Args:
        settings: What was asked for.
        announce: Told in one line what is served and where, once it is.

    Raises:
        StartupError: it can't start as configured.
    """
    stop = _stop_signal()
    models = load_repository(settings.models, settings.runtime, settings.device, settings.max_lanes)
    engine = Engine(
        models,
        max_lanes=settings.max_lanes,
        tick_steps=settings.tick_steps,
        max_queued_steps=settings.max_queued_steps,
    )
    endless = EndlessCalls(SERVICE)
    front = GrpcioFront(settings.listen, [StatusInterceptor(), endless], settings.max_message_bytes)
    service = UnrollService(Catalog(models), engine, settings.limits)
    checks = health.aio.HealthServicer()
    unroll_pb2_grpc.add_UnrollServiceServicer_to_server(service, front.registry)
    health_pb2_grpc.add_HealthServicer_to_server(checks, front.registry)
    names = [SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME]
    reflection.enable_server_reflection(names, front.registry)
    try:
        for name in ("", SERVICE):
            await checks.set(name, health_pb2.HealthCheckResponse.SERVING)
        address = await front.start()
        served = ", ".join(str(model.spec.key) for model in models)
        announce(f"serving {served} on {address} ({settings.runtime}, {settings.device})")
        await stop.wait()
        _log.info("draining")
        await checks.enter_graceful_shutdown()
        service.drain()
        endless.end(LINGER)
        await front.stop(settings.drain_timeout)
    finally:
        engine.close()


def _stop_signal() -> asyncio.Event:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    return stop
