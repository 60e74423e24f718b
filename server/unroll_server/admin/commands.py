"""What operators ask, answered in the process that serves the models."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, Protocol

import grpc
from google.rpc import status_pb2

from unroll_engine.errors import InvalidRequestError, RequestError
from unroll_proto.v1 import admin_pb2 as pb
from unroll_server.errors import SessionNotFoundError
from unroll_server.sessions.service import Sessions
from unroll_server.status import status_of
from unroll_server.workers.rpc import RefusedError

_log = logging.getLogger(__name__)

SESSIONS, MOST_SESSIONS = 1_000, 100_000
"""Sessions in a list, where the request does not say how many, and at most."""


class Repository(Protocol):
    """What loads and unloads models; see repository/repository.py."""

    async def load(self, name: str) -> None:
        """Serves a model's versions."""

    async def unload(self, name: str) -> None:
        """Takes no new work for a model."""

    async def refresh(self) -> None:
        """Looks for new and removed versions."""

    def index(self) -> Iterable[tuple[str, int, str, str]]:
        """Name, version, state and reason of every version."""


class Commands:
    """Answers by method name, with the messages of admin.proto and of channelz as bytes.

    Args:
        repository: The models.
        sessions: The sessions.
    """

    def __init__(self, repository: Repository, sessions: Sessions) -> None:
        self._repository = repository
        self._sessions = sessions
        self._methods: dict[str, tuple[Any, Callable[[Any], Awaitable[Any]]]] = {
            "ListVersions": (pb.ListVersionsRequest, self._list_versions),
            "LoadModel": (pb.LoadModelRequest, self._load),
            "UnloadModel": (pb.UnloadModelRequest, self._unload),
            "RefreshRepository": (pb.RefreshRepositoryRequest, self._refresh),
            "ListSessions": (pb.ListSessionsRequest, self._list_sessions),
            "EndSession": (pb.EndSessionRequest, self._end_session),
        }

    async def ask(self, method: str, request: bytes) -> bytes:
        """The response to a request.

        Raises:
            RefusedError: with the status that says why.
        """
        try:
            if method.startswith("channelz."):
                return await _channelz(method.removeprefix("channelz."), request)
            kind, answer = self._methods[method]
            response: bytes = (await answer(kind.FromString(request))).SerializeToString()
            return response
        except RequestError as error:
            raise RefusedError(status_of(error).SerializeToString()) from None
        except RefusedError:
            raise
        except Exception:
            _log.exception("%s failed", method)
            raise _refusal(grpc.StatusCode.INTERNAL, "the server failed; its log has the cause") from None

    async def _list_versions(self, request: pb.ListVersionsRequest) -> pb.ListVersionsResponse:
        versions = [
            pb.ModelVersion(model=name, version=version, state=_state(state), reason=reason)
            for name, version, state, reason in self._repository.index()
        ]
        return pb.ListVersionsResponse(versions=versions)

    async def _load(self, request: pb.LoadModelRequest) -> pb.LoadModelResponse:
        await self._repository.load(_named(request.model))
        return pb.LoadModelResponse()

    async def _unload(self, request: pb.UnloadModelRequest) -> pb.UnloadModelResponse:
        await self._repository.unload(_named(request.model))
        return pb.UnloadModelResponse()

    async def _refresh(self, request: pb.RefreshRepositoryRequest) -> pb.ListVersionsResponse:
        await self._repository.refresh()
        return await self._list_versions(pb.ListVersionsRequest())

    async def _list_sessions(self, request: pb.ListSessionsRequest) -> pb.ListSessionsResponse:
        if request.limit > MOST_SESSIONS:
            raise InvalidRequestError(f"{request.limit}, {MOST_SESSIONS} at most", "limit")
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
                for listed in await self._sessions.list(request.limit or SESSIONS)
            ]
        )

    async def _end_session(self, request: pb.EndSessionRequest) -> pb.EndSessionResponse:
        if not await self._sessions.end(request.owner, request.session_id):
            raise SessionNotFoundError("this owner has no such session", "session_id")
        return pb.EndSessionResponse()


def _named(model: str) -> str:
    if not model:
        raise InvalidRequestError("a model's name is needed", "model")
    return model


def _state(state: str) -> "pb.VersionState.ValueType":
    return pb.VersionState.Value(f"VERSION_STATE_{state}")


async def _channelz(method: str, request: bytes) -> bytes:
    # Not needed unless it is asked; it waits for the locks of the core.
    from unroll_server.admin import channelz

    code, details, response = await asyncio.to_thread(channelz.answer, method, request)
    if code is not grpc.StatusCode.OK:
        raise _refusal(code, details)
    return response


def _refusal(code: grpc.StatusCode, message: str) -> RefusedError:
    return RefusedError(status_pb2.Status(code=code.value[0], message=message).SerializeToString())
