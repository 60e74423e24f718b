"""The listener itself: a server of its own beside the one that callers use, in the only process or in the parent."""

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, NoReturn

import grpc
from google.rpc import status_pb2
from grpc_health.v1 import health_pb2_grpc

from unroll_proto.v1 import admin_pb2 as pb
from unroll_proto.v1 import admin_pb2_grpc
from unroll_server.admin import channelz, inference
from unroll_server.admin.merging import Processes, StatusError, merged_versions
from unroll_server.api import health
from unroll_server.api.health import Health
from unroll_server.api.reflection import add_reflection
from unroll_server.config import Settings
from unroll_server.identity.quotas import Quotas
from unroll_server.identity.tokens import Identities
from unroll_server.middleware.access_log import CallObserver
from unroll_server.middleware.auth import AuthMiddleware
from unroll_server.middleware.drain_streams import DrainStreams
from unroll_server.status import DETAILS
from unroll_server.telemetry.metrics import Metrics
from unroll_server.transport.grpcio import GrpcioTransport
from unroll_server.transport.registry import Registry
from unroll_server.transport.tls import Certificates
from unroll_server.workers.rpc import Ask

_log = logging.getLogger(__name__)

SERVICE = pb.DESCRIPTOR.services_by_name["AdminService"].full_name
MESSAGE_BYTES = 2**20
"""Bytes of a request, at most."""
GRACE = 1.0
"""Seconds that calls in flight have to end."""
_STATUS = {code.value[0]: code for code in grpc.StatusCode}


class AdminService(admin_pb2_grpc.AdminServiceServicer):
    """The service over all processes.

    Args:
        processes: Who serves the models.
    """

    def __init__(self, processes: Processes) -> None:
        # And not loaded since.
        self._unloaded: set[str] = set()
        self._processes = processes
        # What changes models is done in one order by all.
        self._changing = asyncio.Lock()

    async def ListVersions(self, request: pb.ListVersionsRequest, context: Any) -> pb.ListVersionsResponse:
        """See admin.proto."""
        return merged_versions(await self._all("ListVersions", request, context))

    async def LoadModel(self, request: pb.LoadModelRequest, context: Any) -> pb.LoadModelResponse:
        """See admin.proto."""
        async with self._changing:
            self._unloaded.discard(request.model)
            await self._all("LoadModel", request, context)
        _log.info("loaded %s", request.model)
        return pb.LoadModelResponse()

    async def UnloadModel(self, request: pb.UnloadModelRequest, context: Any) -> pb.UnloadModelResponse:
        """See admin.proto."""
        async with self._changing:
            # Some may have done it before, when others could not.
            await self._all("UnloadModel", request, context, grpc.StatusCode.NOT_FOUND.value[0])
            self._unloaded.add(request.model)
        _log.info("unloaded %s", request.model)
        return pb.UnloadModelResponse()

    async def RefreshRepository(self, request: pb.RefreshRepositoryRequest, context: Any) -> pb.ListVersionsResponse:
        """See admin.proto."""
        async with self._changing:
            return merged_versions(await self._all("RefreshRepository", request, context))

    async def ListSessions(self, request: pb.ListSessionsRequest, context: Any) -> pb.ListSessionsResponse:
        """See admin.proto."""
        return pb.ListSessionsResponse.FromString(await self._any("ListSessions", request, context))

    async def EndSession(self, request: pb.EndSessionRequest, context: Any) -> pb.EndSessionResponse:
        """See admin.proto."""
        return pb.EndSessionResponse.FromString(await self._any("EndSession", request, context))

    async def one(self, number: int, method: str, request: bytes, context: Any) -> bytes:
        """What one process answers; a refusal ends the call."""
        try:
            return await self._processes.ask(number, method, request)
        except StatusError as error:
            await _abort(error.status, context)

    async def catch_up(self, number: int) -> None:
        """Tells a process that has started again what the others were told."""
        async with self._changing:
            for model in sorted(self._unloaded):
                try:
                    await self._processes.ask(
                        number, "UnloadModel", pb.UnloadModelRequest(model=model).SerializeToString()
                    )
                except StatusError as error:
                    if error.status.code != grpc.StatusCode.NOT_FOUND.value[0]:
                        _log.error("%s is served by a worker that was started again: %s", model, error)

    async def _all(self, method: str, request: Any, context: Any, harmless: int | None = None) -> list[bytes]:
        try:
            return await self._processes.ask_all(method, request.SerializeToString(), harmless)
        except StatusError as error:
            await _abort(error.status, context)

    async def _any(self, method: str, request: Any, context: Any) -> bytes:
        try:
            return await self._processes.ask_any(method, request.SerializeToString())
        except StatusError as error:
            await _abort(error.status, context)


async def _abort(status: status_pb2.Status, context: Any) -> NoReturn:
    await context.abort(_STATUS[status.code], status.message, ((DETAILS, status.SerializeToString()),))
    raise AssertionError("abort raises")


class AdminListener:
    """Serves operators on `settings.admin`.

    Args:
        settings: What was asked for.
        identities: Who is known.
        asks: How each process that serves the models is asked.

    Raises:
        StartupError: it can't serve as configured.
    """

    def __init__(self, settings: Settings, identities: Identities, asks: Sequence[Ask]) -> None:
        address = settings.admin_address
        assert address is not None
        processes = Processes(asks)
        self._auth = AuthMiddleware(identities, Quotas(identities), admins_only=True)
        self._drain_streams = DrainStreams(SERVICE)
        registry: Any = Registry(CallObserver(Metrics()), [self._auth, self._drain_streams])
        self._transport = GrpcioTransport(
            address,
            registry,
            MESSAGE_BYTES,
            connections=settings.connections,
            certificates=Certificates.of(settings),
        )
        self._checks = Health()
        self._service = AdminService(processes)
        admin_pb2_grpc.add_AdminServiceServicer_to_server(self._service, registry)
        health_pb2_grpc.add_HealthServicer_to_server(self._checks, registry)
        registry.add_registered_method_handlers(inference.SERVICE, inference.Repository(self._service).handlers())
        registry.add_registered_method_handlers(channelz.SERVICE, channelz.Merged(asks, self._service.one).handlers())
        add_reflection([SERVICE, inference.SERVICE, channelz.SERVICE, health.SERVICE], registry)

    async def catch_up(self, number: int) -> None:
        """Tells a process that has started again what the others were told."""
        await self._service.catch_up(number)

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        """Listens, and ends with the calls in flight afterwards.

        Raises:
            StartupError: the address can't be listened on.
        """
        address = await self._transport.start()
        self._checks.set({"": True})
        _log.info("admin on %s", address)
        watching = asyncio.create_task(self._auth.watch())
        try:
            yield
        finally:
            watching.cancel()
            self._checks.end()
            self._drain_streams.end(GRACE)
            await self._transport.stop(GRACE)
