"""The admin listener: a second gRPC server besides the one for callers, in a single process and in a supervisor.

Each worker has one too, on a private Unix socket, for its supervisor.
"""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from grpc_channelz.v1.channelz_pb2_grpc import add_ChannelzServicer_to_server
from grpc_health.v1 import health_pb2_grpc

from unroll_proto.v1.admin_pb2_grpc import AdminServiceServicer, add_AdminServiceServicer_to_server
from unroll_server.admin import channelz, fan_out, inference
from unroll_server.api import health
from unroll_server.api.health import Health
from unroll_server.api.reflection import add_reflection
from unroll_server.config import Settings
from unroll_server.identity.quotas import Quotas
from unroll_server.identity.tokens import Identities
from unroll_server.middleware.access_log import CallObserver
from unroll_server.middleware.auth import AuthMiddleware
from unroll_server.middleware.drain_streams import DrainStreams
from unroll_server.telemetry.metrics import Metrics
from unroll_server.transport.grpcio import GrpcioTransport
from unroll_server.transport.registry import Registry
from unroll_server.transport.tls import Certificates

_log = logging.getLogger(__name__)

MAX_MESSAGE_BYTES = 2**20
"""Size of the largest request."""
GRACE = 1.0
"""Seconds within which calls in flight may end."""


class AdminListener:
    """Serves operators on `settings.admin`.

    Args:
        settings: Settings of the server.
        admin: Servicer of unroll.v1.AdminService.
        channelz_service: Servicer of grpc.channelz.v1.Channelz.
        identities: Identities of operators; None on a worker's private socket, which has neither tokens nor TLS.

    Raises:
        StartupError: it can't serve as configured.
    """

    def __init__(
        self,
        settings: Settings,
        admin: AdminServiceServicer,
        channelz_service: channelz.Channelz | channelz.MergedChannelz,
        identities: Identities | None = None,
    ) -> None:
        assert settings.admin_address is not None
        self._auth = AuthMiddleware(identities, Quotas(identities), admins_only=True) if identities else None
        self._drain_streams = DrainStreams(fan_out.SERVICE.full_name)
        guards = [self._auth] if self._auth else []
        registry: Any = Registry(CallObserver(Metrics()), [*guards, self._drain_streams])
        self._transport = GrpcioTransport(
            settings.admin_address,
            registry,
            MAX_MESSAGE_BYTES,
            connections=settings.connections,
            certificates=Certificates.of(settings) if identities else None,
        )
        self._checks = Health()
        add_AdminServiceServicer_to_server(admin, registry)
        health_pb2_grpc.add_HealthServicer_to_server(self._checks, registry)
        registry.add_registered_method_handlers(inference.SERVICE, inference.Repository(admin).handlers())
        add_ChannelzServicer_to_server(channelz_service, registry)
        services = [fan_out.SERVICE.full_name, inference.SERVICE, channelz.SERVICE.full_name, health.SERVICE]
        add_reflection(services, registry)

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        """Listens, and cancels calls in flight `GRACE` seconds after the end of the block.

        Raises:
            StartupError: the address can't be listened on.
        """
        address = await self._transport.start()
        self._checks.set({"": True})
        _log.log(logging.INFO if self._auth else logging.DEBUG, "admin on %s", address)
        watching = asyncio.create_task(self._auth.watch()) if self._auth else None
        try:
            yield
        finally:
            if watching:
                watching.cancel()
            self._checks.end()
            self._drain_streams.end(GRACE)
            await self._transport.stop(GRACE)
