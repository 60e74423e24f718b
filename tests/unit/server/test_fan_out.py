"""A supervisor's admin service over the private admin listeners of workers."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from support import wire
from support.processes import PATIENCE
from support.settings import SETTINGS

from unroll_engine.errors import ModelNotFoundError
from unroll_proto.inference import service_pb2 as oip
from unroll_proto.inference.service_pb2_grpc import GRPCInferenceServiceStub
from unroll_proto.v1 import admin_pb2 as pb
from unroll_proto.v1.admin_pb2_grpc import AdminServiceServicer, AdminServiceStub
from unroll_server.admin import fan_out
from unroll_server.admin.channelz import Channelz, MergedChannelz
from unroll_server.admin.fan_out import MergedAdminService, Workers
from unroll_server.admin.listener import AdminListener
from unroll_server.errors import ModelRefusedError, SessionNotFoundError

READY, LOADING = pb.VERSION_STATE_READY, pb.VERSION_STATE_LOADING


class Worker(AdminServiceServicer):
    """The admin service of a worker with models in given states; it unloads models while `answers` is set."""

    def __init__(self, sessions: int = 0, **models: "pb.VersionState.ValueType") -> None:
        self.models = models
        self.answers = asyncio.Event()
        self.answers.set()
        self._sessions = sessions

    async def ListVersions(self, request: pb.ListVersionsRequest, context: Any) -> pb.ListVersionsResponse:  # noqa: N802
        versions = [pb.ModelVersion(model=name, version=1, state=state) for name, state in self.models.items()]
        return pb.ListVersionsResponse(versions=versions)

    async def LoadModel(self, request: pb.LoadModelRequest, context: Any) -> pb.LoadModelResponse:  # noqa: N802
        if request.model == "bad":
            raise ModelRefusedError("a file is missing")
        self.models[request.model] = READY
        return pb.LoadModelResponse()

    async def UnloadModel(self, request: pb.UnloadModelRequest, context: Any) -> pb.UnloadModelResponse:  # noqa: N802
        await self.answers.wait()
        if self.models.pop(request.model, None) is None:
            raise ModelNotFoundError(f"{request.model!r} is not served", "model")
        return pb.UnloadModelResponse()

    async def ListSessions(self, request: pb.ListSessionsRequest, context: Any) -> pb.ListSessionsResponse:  # noqa: N802
        return pb.ListSessionsResponse(sessions=[pb.SessionSummary(session_id="s" * 100)] * self._sessions)

    async def RefreshRepository(self, request: pb.RefreshRepositoryRequest, context: Any) -> pb.ListVersionsResponse:  # noqa: N802
        return await self.ListVersions(pb.ListVersionsRequest(), context)

    async def EndSession(self, request: pb.EndSessionRequest, context: Any) -> pb.EndSessionResponse:  # noqa: N802
        raise SessionNotFoundError("this owner has no such session", "session_id")


@asynccontextmanager
async def served(folder: Path, *workers: Worker | None) -> AsyncIterator[tuple[Any, MergedAdminService]]:
    """Yields a channel to the supervisor's listener, and its service; a worker may be missing."""
    sockets = [folder / f"{number}.sock" for number in range(len(workers))]
    settings = SETTINGS.replace(workers=len(workers), admin=f"unix:{folder}/admin.sock")
    async with AsyncExitStack() as stack:
        for worker, socket in zip(workers, sockets, strict=True):
            if worker:
                listener = AdminListener(settings.replace(admin=f"unix:{socket}"), worker, Channelz())
                await stack.enter_async_context(listener.serving())
        called = await stack.enter_async_context(aclosing(Workers(sockets)))
        service = MergedAdminService(called)
        listener = AdminListener(settings, service, MergedChannelz(called))
        await stack.enter_async_context(listener.serving())
        options = [("grpc.max_receive_message_length", -1)]
        channel = await stack.enter_async_context(grpc.aio.insecure_channel(f"unix:{folder}/admin.sock", options))
        yield channel, service


async def test_the_versions_of_workers_are_merged_and_differences_named(tmp_path: Path) -> None:
    async with served(tmp_path, Worker(a=READY, b=READY, c=READY), Worker(a=READY, b=LOADING)) as (channel, _):
        found = await AdminServiceStub(channel).ListVersions(pb.ListVersionsRequest(), timeout=PATIENCE)
        assert [(each.model, each.state, each.reason) for each in found.versions] == [
            ("a", READY, ""),
            ("b", LOADING, "worker 0: READY; worker 1: LOADING"),
            ("c", READY, "worker 0: READY"),
        ]
        stub: Any = GRPCInferenceServiceStub(channel)
        index = await stub.RepositoryIndex(oip.RepositoryIndexRequest(ready=True), timeout=PATIENCE)
        assert [each.name for each in index.models] == ["a", "c"]


async def test_every_worker_loads_and_unloads(tmp_path: Path) -> None:
    workers = Worker(a=READY), Worker(b=READY)
    async with served(tmp_path, *workers) as (channel, _):
        stub = AdminServiceStub(channel)
        await stub.LoadModel(pb.LoadModelRequest(model="c"), timeout=PATIENCE)
        assert all("c" in worker.models for worker in workers)
        # An earlier call may have failed for some workers.
        await stub.UnloadModel(pb.UnloadModelRequest(model="a"), timeout=PATIENCE)
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await stub.UnloadModel(pb.UnloadModelRequest(model="a"), timeout=PATIENCE)
        assert raised.value.code() is grpc.StatusCode.NOT_FOUND
        assert raised.value.details() == "; ".join(f"worker {n}: model: 'a' is not served" for n in range(2))


async def test_a_refusal_names_each_worker_and_has_the_code_that_says_most(tmp_path: Path) -> None:
    async with served(tmp_path, None, Worker()) as (channel, _):
        stub = AdminServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await stub.LoadModel(pb.LoadModelRequest(model="bad"), timeout=PATIENCE)
        assert raised.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        expected = "worker 0: it does not serve now; retry; worker 1: a file is missing"
        assert raised.value.details() == expected
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await stub.ListVersions(pb.ListVersionsRequest(), timeout=PATIENCE)
        assert raised.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_any_worker_lists_the_sessions_however_many(tmp_path: Path) -> None:
    async with served(tmp_path, None, Worker(sessions=50_000)) as (channel, _):
        found = await AdminServiceStub(channel).ListSessions(pb.ListSessionsRequest(), timeout=PATIENCE)
        assert len(found.sessions) == 50_000
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await AdminServiceStub(channel).EndSession(pb.EndSessionRequest(session_id="s"), timeout=PATIENCE)
        assert raised.value.code() is grpc.StatusCode.NOT_FOUND
        assert wire.details_of(raised.value).details


async def test_a_restarted_worker_unloads_what_the_others_unloaded(tmp_path: Path) -> None:
    workers = Worker(a=READY, b=READY), Worker(a=READY, b=READY)
    async with served(tmp_path, *workers) as (channel, service):
        await AdminServiceStub(channel).UnloadModel(pb.UnloadModelRequest(model="a"), timeout=PATIENCE)
        workers[1].models["a"] = READY
        await service.catch_up(1)
        assert workers[1].models == {"b": READY}
        # A worker without the model is not an error.
        await service.catch_up(1)


async def test_a_restarted_worker_that_does_not_answer_is_logged_and_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(fan_out, "CATCH_UP_SECONDS", 0.1)
    workers = Worker(a=READY), Worker(a=READY)
    async with served(tmp_path, *workers) as (channel, service):
        await AdminServiceStub(channel).UnloadModel(pb.UnloadModelRequest(model="a"), timeout=PATIENCE)
        workers[1].answers.clear()
        await service.catch_up(1)
        assert "a restarted worker serves a, which was unloaded: worker 1: " in caplog.text
