"""grpc.health.v1.Health: the serving status of the server and its models, by name."""

import asyncio
from collections.abc import Mapping
from typing import Any

import grpc
from grpc_health.v1 import health_pb2 as pb

from unroll_server.errors import DrainingError

SERVICE = pb.DESCRIPTOR.services_by_name["Health"].full_name


class Health:
    """The service. grpcio-health-checking's own lacks `List` and waits for its watchers to read.

    The name "" stands for the whole server, which does not serve until it is set.
    """

    def __init__(self) -> None:
        self._serving = {"": False}
        # Replaced at each change, so that a watcher waits for the change after its last report.
        self._changed = asyncio.Event()
        self._ended = False

    def set(self, serving: Mapping[str, bool]) -> None:
        """Sets the status of each name, True for serving; ignored after `end`."""
        if not self._ended:
            self._set(serving)

    def end(self) -> None:
        """Sets all names to not serving, permanently. Watchers end after that answer."""
        self._ended = True
        self._set(dict.fromkeys(self._serving, False))

    async def Check(self, request: pb.HealthCheckRequest, context: Any) -> pb.HealthCheckResponse:
        """See health.proto."""
        if request.service not in self._serving:
            await context.abort(grpc.StatusCode.NOT_FOUND, "no such service")
        return pb.HealthCheckResponse(status=self._status_of(request.service))

    async def List(self, request: pb.HealthListRequest, context: Any) -> pb.HealthListResponse:
        """See health.proto."""
        return pb.HealthListResponse(
            statuses={name: pb.HealthCheckResponse(status=self._status_of(name)) for name in self._serving}
        )

    async def Watch(self, request: pb.HealthCheckRequest, context: Any) -> None:
        """See health.proto."""
        reported = None
        while True:
            changed, status = self._changed, self._status_of(request.service)
            if status != reported:
                await context.write(pb.HealthCheckResponse(status=status))
                reported = status
            elif self._ended:
                raise DrainingError("the rest of this call")
            else:
                await changed.wait()

    def _set(self, serving: Mapping[str, bool]) -> None:
        self._serving.update(serving)
        self._changed.set()
        self._changed = asyncio.Event()

    def _status_of(self, name: str) -> "pb.HealthCheckResponse.ServingStatus.ValueType":
        serving = self._serving.get(name)
        if serving is None:
            return pb.HealthCheckResponse.SERVICE_UNKNOWN
        return pb.HealthCheckResponse.SERVING if serving else pb.HealthCheckResponse.NOT_SERVING
