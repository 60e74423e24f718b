"""The admin listener of real servers, of one process and of several."""

import asyncio
import os
import re
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import numpy as np
import pytest
from grpc_channelz.v1 import channelz_pb2, channelz_pb2_grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from support import bundles, wire
from support.operators import admin_address, channel_to, wait_for_log
from support.processes import PATIENCE, ServerProcess, run
from support.waiting import until
from support.workers import wait_until_gone, workers_of

from unroll_proto.inference import service_pb2 as oip
from unroll_proto.inference.service_pb2_grpc import GRPCInferenceServiceStub
from unroll_proto.v1 import admin_pb2 as admin
from unroll_proto.v1 import unroll_pb2 as pb
from unroll_proto.v1.admin_pb2_grpc import AdminServiceStub

CONNECTIONS = 12
"""Connections enough for each of two workers to get some."""
STEPS = np.zeros((3, 12), np.float32)


@pytest.fixture(scope="session")
def exported(bundle_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository that holds `jv`, version 1, and `other`, versions 1 and 2."""
    root = tmp_path_factory.mktemp("two-models")
    for name, version in (("jv", 1), ("other", 1), ("other", 2)):
        bundles.publish(bundle_root / "jv" / "1", root, name, version)
    return root


@pytest.fixture
def models(exported: Path, tmp_path: Path) -> Path:
    """A separate repository with version 1 of `jv` and `other`."""
    root = tmp_path / "models"
    shutil.copytree(exported, root)
    (root / "other" / "2").rename(tmp_path / "staged")
    return root


OPTIONS = ("--admin", "127.0.0.1:0", "--models-poll", "0", "--workers")


@pytest.fixture(scope="module", params=["1", "2"])
def administered(
    exported: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[ServerProcess]:
    """A server of `jv` and two versions of `other`, which tests restore."""
    log = tmp_path_factory.mktemp("administered") / "log"
    with ServerProcess(exported, log, *OPTIONS, str(request.param)) as process:
        yield process
        assert process.stop() == 0, process.log


async def statuses(address: str, model: str) -> set[grpc.StatusCode]:
    """Statuses of calls for a model over enough connections to reach every worker."""

    async def ask() -> grpc.StatusCode:
        async with channel_to(address) as channel:
            call = wire.stub_of(channel).Classify(wire.classify_request([STEPS], model), timeout=PATIENCE)
            return await call.code()

    return set(await asyncio.gather(*(ask() for _ in range(CONNECTIONS))))


async def states(stub: AdminServiceStub) -> dict[tuple[str, int], str]:
    response = await stub.ListVersions(admin.ListVersionsRequest(), timeout=PATIENCE)
    return {
        (version.model, version.version): admin.VersionState.Name(version.state).removeprefix("VERSION_STATE_")
        for version in response.versions
    }


async def test_models_are_unloaded_and_loaded_by_every_worker(administered: ServerProcess) -> None:
    async with channel_to(admin_address(administered)) as channel:
        stub: Any = AdminServiceStub(channel)
        assert await states(stub) == {("jv", 1): "READY", ("other", 1): "READY", ("other", 2): "READY"}
        await stub.UnloadModel(admin.UnloadModelRequest(model="other"), timeout=PATIENCE)

        async def alone() -> bool:
            return await states(stub) == {("jv", 1): "READY"}

        # With several workers the state of a version that drains may linger.
        await until(alone)
        assert await statuses(administered.address, "other") == {grpc.StatusCode.NOT_FOUND}
        assert await statuses(administered.address, "jv") == {grpc.StatusCode.OK}
        # A scan does not load again a model that was unloaded by name.
        await stub.RefreshRepository(admin.RefreshRepositoryRequest(), timeout=PATIENCE)
        assert await statuses(administered.address, "other") == {grpc.StatusCode.NOT_FOUND}
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await stub.UnloadModel(admin.UnloadModelRequest(model="other"), timeout=PATIENCE)
        assert raised.value.code() == grpc.StatusCode.NOT_FOUND
        await stub.LoadModel(admin.LoadModelRequest(model="other"), timeout=PATIENCE)
        assert await statuses(administered.address, "other") == {grpc.StatusCode.OK}


@pytest.mark.parametrize("workers", ["1", "2"])
async def test_a_refresh_finds_new_versions_and_says_why_it_refuses_bad_ones(
    workers: str, models: Path, tmp_path: Path
) -> None:
    with ServerProcess(models, tmp_path / "log", *OPTIONS, workers) as process:
        shutil.copytree(models.parent / "staged", models / "other" / "3")
        (models.parent / "staged").rename(models / "other" / "2")
        await new_versions_are_found(process)
        assert process.stop() == 0, process.log


async def new_versions_are_found(process: ServerProcess) -> None:
    async with channel_to(admin_address(process)) as channel:
        stub: Any = AdminServiceStub(channel)
        response = await stub.RefreshRepository(admin.RefreshRepositoryRequest(), timeout=PATIENCE)
        found = {(each.model, each.version): each for each in response.versions}
        assert found["other", 2].state == admin.VERSION_STATE_READY
        # Its manifest names another model.
        assert found["other", 3].state == admin.VERSION_STATE_REFUSED
        assert "the manifest says other/2" in found["other", 3].reason
        assert "worker" not in found["other", 3].reason
        for wrong in ("", "nothing", "../jv"):
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await stub.LoadModel(admin.LoadModelRequest(model=wrong), timeout=PATIENCE)
            expected = grpc.StatusCode.NOT_FOUND if wrong else grpc.StatusCode.INVALID_ARGUMENT
            assert raised.value.code() == expected


async def test_operators_use_the_open_inference_protocol_too(administered: ServerProcess) -> None:
    async with channel_to(admin_address(administered)) as channel:
        stub: Any = GRPCInferenceServiceStub(channel)
        unload = oip.RepositoryModelUnloadRequest(model_name="other")
        # Triton's client always sends this.
        unload.parameters["unload_dependents"].bool_param = False
        await stub.RepositoryModelUnload(unload, timeout=PATIENCE)
        index = await stub.RepositoryIndex(oip.RepositoryIndexRequest(ready=True), timeout=PATIENCE)
        assert [(each.name, each.version, each.state) for each in index.models] == [("jv", "1", "READY")]
        await stub.RepositoryModelLoad(oip.RepositoryModelLoadRequest(model_name="other"), timeout=PATIENCE)
        assert await statuses(administered.address, "other") == {grpc.StatusCode.OK}
        load = oip.RepositoryModelLoadRequest(model_name="other")
        load.parameters["config"].string_param = "{}"
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await stub.RepositoryModelLoad(load, timeout=PATIENCE)
        assert raised.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        # The admin listener has no inference.
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await stub.ServerLive(oip.ServerLiveRequest(), timeout=PATIENCE)
        assert raised.value.code() == grpc.StatusCode.UNIMPLEMENTED


async def test_sessions_are_listed_and_ended(administered: ServerProcess) -> None:
    async with channel_to(administered.address) as public, channel_to(admin_address(administered)) as channel:
        unroll, stub = wire.stub_of(public), AdminServiceStub(channel)
        begun: Any = pb.AdvanceRequest(session_id="s", model="jv", start=True, values=wire.to_bytes(STEPS))
        await unroll.Advance(begun, timeout=PATIENCE)
        (session,) = (await stub.ListSessions(admin.ListSessionsRequest(), timeout=PATIENCE)).sessions
        assert (session.owner, session.session_id, session.model, session.version) == ("", "s", "jv", 1)
        assert session.step == 3
        assert 0 < session.expires_in <= 3600
        await stub.EndSession(admin.EndSessionRequest(session_id="s"), timeout=PATIENCE)
        assert not (await stub.ListSessions(admin.ListSessionsRequest(), timeout=PATIENCE)).sessions
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await unroll.Advance(pb.AdvanceRequest(session_id="s", values=wire.to_bytes(STEPS)), timeout=PATIENCE)
        assert raised.value.code() == grpc.StatusCode.NOT_FOUND
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await stub.EndSession(admin.EndSessionRequest(session_id="s"), timeout=PATIENCE)
        assert raised.value.code() == grpc.StatusCode.NOT_FOUND


async def test_channelz_tells_of_the_connections_of_every_worker(administered: ServerProcess) -> None:
    async with channel_to(admin_address(administered)) as channel:
        stub: Any = channelz_pb2_grpc.ChannelzStub(channel)
        servers = (await stub.GetServers(channelz_pb2.GetServersRequest(), timeout=PATIENCE)).server
        async with channel_to(administered.address) as public:
            await wire.stub_of(public).GetModel(pb.GetModelRequest(model="jv"), timeout=PATIENCE)
            servers = (await stub.GetServers(channelz_pb2.GetServersRequest(), timeout=PATIENCE)).server
            ids = [server.ref.server_id for server in servers]
            assert len(set(ids)) == len(ids) >= max(1, len(workers_of(administered.process.pid)))
            sockets = []
            for server in ids:
                found = await stub.GetServer(channelz_pb2.GetServerRequest(server_id=server), timeout=PATIENCE)
                assert found.server.ref.server_id == server
                request = channelz_pb2.GetServerSocketsRequest(server_id=server)
                sockets += [
                    ref.socket_id for ref in (await stub.GetServerSockets(request, timeout=PATIENCE)).socket_ref
                ]
            assert sockets
            for socket in sockets:
                answer = await stub.GetSocket(channelz_pb2.GetSocketRequest(socket_id=socket), timeout=PATIENCE)
                assert answer.socket.ref.socket_id == socket
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await stub.GetServer(channelz_pb2.GetServerRequest(server_id=10**9), timeout=PATIENCE)
        assert raised.value.code() == grpc.StatusCode.NOT_FOUND


def test_each_listener_serves_its_own_services_alone(administered: ServerProcess) -> None:
    own = {"unroll.v1.AdminService", "inference.GRPCInferenceService", "grpc.channelz.v1.Channelz"}
    with grpc.insecure_channel(admin_address(administered)) as channel:
        assert own | {"grpc.health.v1.Health"} <= set(ProtoReflectionDescriptorDatabase(channel).get_services())
        health = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=PATIENCE)
        assert health.status == health_pb2.HealthCheckResponse.SERVING
        classify: Any = channel.unary_unary("/unroll.v1.UnrollService/Classify")
        with pytest.raises(grpc.RpcError) as raised:
            classify(b"", timeout=PATIENCE)
        assert raised.value.code() == grpc.StatusCode.UNIMPLEMENTED
    with grpc.insecure_channel(administered.address) as channel:
        assert not {"unroll.v1.AdminService", "grpc.channelz.v1.Channelz"} & set(
            ProtoReflectionDescriptorDatabase(channel).get_services()
        )
        for method in (
            "unroll.v1.AdminService/ListVersions",
            "unroll.v1.AdminService/UnloadModel",
            "grpc.channelz.v1.Channelz/GetServers",
            "inference.GRPCInferenceService/RepositoryModelLoad",
            "inference.GRPCInferenceService/RepositoryModelUnload",
        ):
            call: Any = channel.unary_unary(f"/{method}")
            with pytest.raises(grpc.RpcError) as raised:
                call(b"", timeout=PATIENCE)
            assert raised.value.code() == grpc.StatusCode.UNIMPLEMENTED


async def test_a_worker_that_starts_again_is_told_what_was_unloaded(models: Path, tmp_path: Path) -> None:
    with ServerProcess(models, tmp_path / "log", *OPTIONS, "2") as process:
        async with channel_to(admin_address(process)) as channel:
            stub: Any = AdminServiceStub(channel)
            await stub.UnloadModel(admin.UnloadModelRequest(model="other"), timeout=PATIENCE)
            victim = workers_of(process.process.pid)[0]
            os.kill(victim, signal.SIGKILL)
            wait_until_gone(victim)
            # Loading needs every worker; the error names a missing one.
            codes = set()
            deadline = time.monotonic() + PATIENCE
            while True:
                assert time.monotonic() < deadline, process.log
                try:
                    found = await states(stub)
                except grpc.aio.AioRpcError as error:
                    codes.add((error.code(), str(error.details()).split(":")[0]))
                    continue
                if found == {("jv", 1): "READY"}:
                    break
            assert codes <= {(grpc.StatusCode.UNAVAILABLE, "worker 0"), (grpc.StatusCode.UNAVAILABLE, "worker 1")}
        assert await statuses(process.address, "other") == {grpc.StatusCode.NOT_FOUND}
        assert await statuses(process.address, "jv") == {grpc.StatusCode.OK}
        assert process.stop() == 0, process.log


@pytest.mark.parametrize("address", ["0.0.0.0:0", "[::]:0", "192.0.2.1:50052", "server.example:50052"])
def test_an_admin_listener_for_everybody_needs_a_guard(bundle_root: Path, address: str) -> None:
    done = run("unroll-serve", "--models", bundle_root, "--admin", address, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(f"unroll-serve: --admin: {address} is not a loopback address")
    assert len(done.stderr.splitlines()) == 1


def test_an_admin_address_that_is_taken_ends_the_start(server: ServerProcess, bundle_root: Path) -> None:
    options = ("--listen", "127.0.0.1:0", "--admin", server.address)
    done = run("unroll-serve", "--models", bundle_root, *options, check=False)
    assert done.returncode == 2
    assert f"unroll-serve: --admin: can't listen on {server.address}" in done.stderr


def test_a_folder_too_deep_for_the_sockets_of_workers_ends_the_start(bundle_root: Path, tmp_path: Path) -> None:
    deep = tmp_path / ("deep" * 25)
    deep.mkdir()
    options = ("--listen", "127.0.0.1:0", "--workers", "2", "--admin", "127.0.0.1:0")
    done = run("unroll-serve", "--models", bundle_root, *options, check=False, env={"TMPDIR": str(deep)})
    assert done.returncode == 2
    assert done.stderr.startswith("unroll-serve: TMPDIR: the path has ")
    assert len(done.stderr.splitlines()) == 1
    assert not list(deep.iterdir())


def test_the_log_says_where_it_is_and_what_was_done(administered: ServerProcess) -> None:
    environment = {"UNROLL_ADMIN": admin_address(administered), "COLUMNS": "120"}
    assert "other" in run("unroll", "admin", "index", env=environment).stdout
    before = administered.log.count("unloaded other")
    run("unroll", "admin", "unload", "other", env=environment)
    wait_for_log(administered, "unloaded other", before + 1)
    # With several workers it may still drain.
    assert re.search(r"other.*READY", run("unroll", "admin", "index", env=environment).stdout) is None
    run("unroll", "admin", "load", "other", env=environment)
    assert "other" in run("unroll", "admin", "refresh", env=environment).stdout
    assert run("unroll", "admin", "sessions", env=environment).returncode == 0
    done = run("unroll", "admin", "unload", "nothing", env=environment, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert "nothing" in done.stderr
    done = run("unroll", "admin", "end-session", "nothing", env=environment, check=False)
    assert done.returncode == 2
