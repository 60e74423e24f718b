"""unroll.v1.AdminService in a process that serves the models."""

import logging
from collections.abc import Iterable
from typing import Any, Protocol

from unroll_engine.errors import InvalidRequestError
from unroll_proto.v1 import admin_pb2 as pb
from unroll_proto.v1.admin_pb2_grpc import AdminServiceServicer
from unroll_server.errors import SessionNotFoundError
from unroll_server.sessions.service import Sessions

_log = logging.getLogger(__name__)

DEFAULT_SESSIONS, MAX_SESSIONS = 1_000, 100_000
"""Sessions in a list: default and maximum."""


class Repository(Protocol):
    """Loads and unloads models; see repository/repository.py."""

    async def load(self, name: str) -> None:
        """Loads a model's versions."""

    async def unload(self, name: str) -> None:
        """Stops serving a model."""

    async def refresh(self) -> None:
        """Looks for new and removed versions."""

    def index(self) -> Iterable[tuple[str, int, str, str]]:
        """Returns name, version, state and reason of every version."""


class AdminService(AdminServiceServicer):
    """The admin service over this process's models and sessions.

    Args:
        repository: The models.
        sessions: The sessions.
    """

    def __init__(self, repository: Repository, sessions: Sessions) -> None:
        self._repository = repository
        self._sessions = sessions

    async def ListVersions(self, request: pb.ListVersionsRequest, context: Any) -> pb.ListVersionsResponse:
        """See admin.proto."""
        return pb.ListVersionsResponse(
            versions=[
                pb.ModelVersion(
                    model=name,
                    version=version,
                    state=pb.VersionState.Value(f"VERSION_STATE_{state}"),
                    reason=reason,
                )
                for name, version, state, reason in self._repository.index()
            ]
        )

    async def LoadModel(self, request: pb.LoadModelRequest, context: Any) -> pb.LoadModelResponse:
        """See admin.proto."""
        await self._repository.load(_required(request.model))
        _log.info("loaded %s", request.model)
        return pb.LoadModelResponse()

    async def UnloadModel(self, request: pb.UnloadModelRequest, context: Any) -> pb.UnloadModelResponse:
        """See admin.proto."""
        await self._repository.unload(_required(request.model))
        _log.info("unloaded %s", request.model)
        return pb.UnloadModelResponse()

    async def RefreshRepository(self, request: pb.RefreshRepositoryRequest, context: Any) -> pb.ListVersionsResponse:
        """See admin.proto."""
        await self._repository.refresh()
        return await self.ListVersions(pb.ListVersionsRequest(), context)

    async def ListSessions(self, request: pb.ListSessionsRequest, context: Any) -> pb.ListSessionsResponse:
        """See admin.proto."""
        if request.limit > MAX_SESSIONS:
            raise InvalidRequestError(f"{request.limit}, {MAX_SESSIONS} at most", "limit")
        return pb.ListSessionsResponse(
            sessions=[
                pb.SessionSummary(
                    owner=listed.owner,
                    session_id=listed.session_id,
                    model=listed.model.name,
                    version=listed.model.version,
                    step=listed.step,
                    expires_in=listed.expires_in,
                )
                for listed in await self._sessions.list(request.limit or DEFAULT_SESSIONS)
            ]
        )

    async def EndSession(self, request: pb.EndSessionRequest, context: Any) -> pb.EndSessionResponse:
        """See admin.proto."""
        if not await self._sessions.end(request.owner, request.session_id):
            raise SessionNotFoundError("this owner has no such session", "session_id")
        return pb.EndSessionResponse()


def _required(model: str) -> str:
    if not model:
        raise InvalidRequestError("required", "model")
    return model
