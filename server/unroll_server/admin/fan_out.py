"""Calls to every worker of a supervisor, and unroll.v1.AdminService as the merge of their answers."""

import asyncio
import logging
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import quote

import grpc
import grpc.aio
from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from google.rpc import status_pb2

from unroll_engine.errors import shortened
from unroll_proto.v1 import admin_pb2 as pb
from unroll_proto.v1.admin_pb2_grpc import AdminServiceServicer
from unroll_server.addresses import UNIX
from unroll_server.status import DETAILS

_log = logging.getLogger(__name__)

SERVICE = pb.DESCRIPTOR.services_by_name["AdminService"]
RECONNECT_MS = 100
"""Milliseconds between attempts to connect to a worker."""
CATCH_UP_SECONDS = 10.0
"""Seconds in which a restarted worker must answer. It may crash meanwhile."""
_OPTIONS = [
    # A list of sessions can exceed the default of 4 MiB.
    ("grpc.max_receive_message_length", -1),
    ("grpc.initial_reconnect_backoff_ms", RECONNECT_MS),
    ("grpc.max_reconnect_backoff_ms", RECONNECT_MS),
]
_CODES = {code.value[0]: code for code in grpc.StatusCode}
_NOT_FOUND: int = grpc.StatusCode.NOT_FOUND.value[0]
_UNAVAILABLE: int = grpc.StatusCode.UNAVAILABLE.value[0]


class CallError(Exception):
    """A call to a worker failed.

    Attributes:
        status: Its status, whose message names the worker.
    """

    def __init__(self, status: status_pb2.Status) -> None:
        super().__init__(status.message)
        self.status = status


class Workers:
    """Unary calls to one, any or every worker. Created and used on one event loop.

    Args:
        sockets: Path of each worker's private Unix socket.
    """

    def __init__(self, sockets: Sequence[Path]) -> None:
        # The core decodes it as the path of a URI.
        targets = [UNIX + quote(str(socket)) for socket in sockets]
        self._channels = [grpc.aio.insecure_channel(target, _OPTIONS) for target in targets]

    def __len__(self) -> int:
        return len(self._channels)

    async def aclose(self) -> None:
        """Closes the connections."""
        for channel in self._channels:
            await channel.close()

    async def call(
        self, worker: int, service: ServiceDescriptor, method: str, request: Message, context: Any = None
    ) -> Any:
        """Calls a method of one worker and returns its response.

        Args:
            worker: Number of the worker.
            service: Service of the method.
            method: Name of the method.
            request: Request of the method.
            context: Context of the caller's call; None for a call of the supervisor's own to a restarted worker.

        Raises:
            CallError: the worker refused the call, or does not serve.
        """
        call: Any = self._channels[worker].unary_unary(
            f"/{service.full_name}/{method}",
            request_serializer=type(request).SerializeToString,
            response_deserializer=GetMessageClass(service.methods_by_name[method].output_type).FromString,
        )
        try:
            if context is None:
                # Its channel may have yet to connect again.
                return await call(request, wait_for_ready=True, timeout=CATCH_UP_SECONDS)
            return await call(request, timeout=context.time_remaining())
        except grpc.aio.AioRpcError as error:
            status = _status_of(error)
            status.message = f"worker {worker}: {status.message}"
            raise CallError(status) from None

    async def call_any(self, service: ServiceDescriptor, method: str, request: Message, context: Any) -> Any:
        """Returns the response of the first worker that serves, for a method about shared data.

        A refusal ends the caller's call.
        """
        for worker in range(len(self)):
            try:
                return await self.call(worker, service, method, request, context)
            except CallError as error:
                if error.status.code != _UNAVAILABLE or worker == len(self) - 1:
                    await abort(context, error.status)
        raise AssertionError("a supervisor has a worker")

    async def call_all(
        self,
        service: ServiceDescriptor,
        method: str,
        request: Message,
        context: Any,
        tolerated: int | None = None,
    ) -> list[Any]:
        """Calls every worker, one after the other: loading a model takes a core, and measures how fast the model runs.

        A refusal ends the caller's call, after all workers were called. Its message lists every refusal.

        Args:
            service: Service of the method.
            method: Name of the method.
            request: Request of the method.
            context: Context of the caller's call.
            tolerated: Status code that does not count as a refusal if another worker accepted the call.

        Returns:
            The responses, in the order of the workers.
        """
        responses: list[Any] = []
        refusals: list[status_pb2.Status] = []
        for worker in range(len(self)):
            try:
                responses.append(await self.call(worker, service, method, request, context))
            except CallError as error:
                refusals.append(error.status)
        if responses:
            refusals = [status for status in refusals if status.code != tolerated]
        if refusals:
            # A worker that does not serve has the least to report.
            status = next((status for status in refusals if status.code != _UNAVAILABLE), refusals[0])
            status.message = shortened("; ".join(status.message for status in refusals))
            await abort(context, status)
        return responses


class MergedAdminService(AdminServiceServicer):
    """The admin service of a supervisor.

    Args:
        workers: The workers.
    """

    def __init__(self, workers: Workers) -> None:
        self._workers = workers
        # Models that were unloaded by name, and not loaded since.
        self._unloaded: set[str] = set()
        # All workers make changes in the same order.
        self._changing = asyncio.Lock()

    async def ListVersions(self, request: pb.ListVersionsRequest, context: Any) -> pb.ListVersionsResponse:
        """See admin.proto."""
        return merge_versions(await self._workers.call_all(SERVICE, "ListVersions", request, context))

    async def LoadModel(self, request: pb.LoadModelRequest, context: Any) -> pb.LoadModelResponse:
        """See admin.proto."""
        async with self._changing:
            self._unloaded.discard(request.model)
            await self._workers.call_all(SERVICE, "LoadModel", request, context)
        return pb.LoadModelResponse()

    async def UnloadModel(self, request: pb.UnloadModelRequest, context: Any) -> pb.UnloadModelResponse:
        """See admin.proto."""
        async with self._changing:
            # An earlier call may have failed after some workers had unloaded the model.
            await self._workers.call_all(SERVICE, "UnloadModel", request, context, _NOT_FOUND)
            self._unloaded.add(request.model)
        return pb.UnloadModelResponse()

    async def RefreshRepository(self, request: pb.RefreshRepositoryRequest, context: Any) -> pb.ListVersionsResponse:
        """See admin.proto."""
        async with self._changing:
            return merge_versions(await self._workers.call_all(SERVICE, "RefreshRepository", request, context))

    async def ListSessions(self, request: pb.ListSessionsRequest, context: Any) -> pb.ListSessionsResponse:
        """See admin.proto."""
        response: pb.ListSessionsResponse = await self._workers.call_any(SERVICE, "ListSessions", request, context)
        return response

    async def EndSession(self, request: pb.EndSessionRequest, context: Any) -> pb.EndSessionResponse:
        """See admin.proto."""
        response: pb.EndSessionResponse = await self._workers.call_any(SERVICE, "EndSession", request, context)
        return response

    async def catch_up(self, worker: int) -> None:
        """Unloads from a restarted worker the models that were unloaded before."""
        async with self._changing:
            for model in sorted(self._unloaded):
                try:
                    await self._workers.call(worker, SERVICE, "UnloadModel", pb.UnloadModelRequest(model=model))
                except CallError as error:
                    if error.status.code != _NOT_FOUND:
                        _log.error("a restarted worker serves %s, which was unloaded: %s", model, error)


def merge_versions(responses: Sequence[pb.ListVersionsResponse]) -> pb.ListVersionsResponse:
    """Merges the versions of all workers.

    A version that some worker does not serve has that worker's state. Its reason lists the states that differ.
    """
    found: dict[tuple[str, int], list[tuple[int, pb.ModelVersion]]] = defaultdict(list)
    for worker, response in enumerate(responses):
        for version in response.versions:
            found[version.model, version.version].append((worker, version))
    merged = pb.ListVersionsResponse()
    for key in sorted(found):
        versions = found[key]
        chosen = next((version for _, version in versions if version.state != pb.VERSION_STATE_READY), versions[0][1])
        if len(versions) < len(responses) or any(version.state != chosen.state for _, version in versions):
            # Workers load one after the other, and a restarted one may be behind.
            states = "; ".join(
                f"worker {worker}: {pb.VersionState.Name(version.state).removeprefix('VERSION_STATE_')}"
                for worker, version in versions
            )
            chosen.reason = f"{chosen.reason} ({states})" if chosen.reason else states
        merged.versions.append(chosen)
    return merged


async def abort(context: Any, status: status_pb2.Status) -> NoReturn:
    """Ends a call with a status and its details."""
    await context.abort(_CODES[status.code], status.message, ((DETAILS, status.SerializeToString()),))
    raise AssertionError("abort raises")


def _status_of(error: grpc.aio.AioRpcError) -> status_pb2.Status:
    """Returns the status that a servicer ended its call with, or that of a call that reached no servicer."""
    details = dict(error.trailing_metadata() or ()).get(DETAILS)
    if isinstance(details, bytes):
        return status_pb2.Status.FromString(details)
    message = "it does not serve now; retry" if error.code() is grpc.StatusCode.UNAVAILABLE else error.details()
    return status_pb2.Status(code=error.code().value[0], message=message)
