"""Tokens, identities and quotas on real servers; no secrets and no values in logs or metrics."""

import asyncio
import base64
import re
import secrets
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import numpy as np
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from support import wire
from support.operators import admin_address, bearer, channel_to, wait_for_log, write_identities
from support.processes import PATIENCE, ServerProcess, run

from unroll_proto.inference import service_pb2 as oip
from unroll_proto.inference.service_pb2_grpc import GRPCInferenceServiceStub
from unroll_proto.v1 import admin_pb2 as admin
from unroll_proto.v1 import unroll_pb2 as pb
from unroll_proto.v1.admin_pb2_grpc import AdminServiceStub
from unroll_server.identity.tokens import digest_of

STEPS = np.zeros((3, 12), np.float32)
ALICE, BOB, LITTLE = bearer("TOKEN-alice"), bearer("TOKEN-bob"), bearer("TOKEN-little")
LITTLES = {"max_concurrent_calls": 3, "max_queued_steps": 100, "max_open_sequences": 2, "max_sessions": 1}


@pytest.fixture
def identities(tmp_path: Path) -> Path:
    return write_identities(tmp_path / "identities.toml", alice={"admin": True}, bob={}, little=LITTLES)


@pytest.fixture(params=["1", "2"])
def guarded(
    bundle_root: Path, tmp_path: Path, identities: Path, request: pytest.FixtureRequest
) -> Iterator[ServerProcess]:
    options = ["--tokens", str(identities), "--workers", str(request.param), "--admin", "127.0.0.1:0"]
    options += ("--log-level", "debug", "--access-log", "--metrics", "127.0.0.1:0")
    with ServerProcess(bundle_root, tmp_path / "log", *options) as process:
        yield process
        assert process.stop() == 0, process.log


async def refusal(call: Any) -> tuple[grpc.StatusCode, status_pb2.Status]:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call
    return raised.value.code(), wire.details_of(raised.value)


def reasons_of(status: status_pb2.Status) -> list[str]:
    found = []
    for detail in status.details:
        info = error_details_pb2.ErrorInfo()
        if detail.Unpack(info):
            found.append(info.reason)
    return found


def page_at(url: str) -> str:
    with urllib.request.urlopen(url, timeout=PATIENCE) as answer:  # noqa: S310
        return str(answer.read().decode())


def has_retry(status: status_pb2.Status) -> bool:
    return any(detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR) for detail in status.details)


@pytest.mark.parametrize(
    "metadata",
    [
        None,
        (("authorization", "Bearer "),),
        (("authorization", "Bearer TOKEN-carol"),),
        (("authorization", "TOKEN-alice"),),
        (("authorization", "Basic TOKEN-alice"),),
        (("authorization", "Bearer TOKEN-alice"), ("authorization", "Bearer TOKEN-bob")),
        (("authorization", "Bearer " + "x" * 4000),),
        (("x-token", "TOKEN-alice"),),
    ],
)
async def test_every_kind_of_call_needs_a_known_token(shared: ServerProcess, metadata: Any) -> None:
    async with channel_to(shared.address) as channel:
        stub, inference = wire.stub_of(channel), GRPCInferenceServiceStub(channel)
        # Nothing is written, since grpcio reports a write after the refusal as INTERNAL.
        stream = stub.Unroll(metadata=metadata, timeout=PATIENCE)
        calls = [
            stub.Classify(wire.classify_request([STEPS]), metadata=metadata, timeout=PATIENCE),
            stub.ListModels(pb.ListModelsRequest(), metadata=metadata, timeout=PATIENCE),
            stub.Advance(pb.AdvanceRequest(session_id="a", start=True), metadata=metadata, timeout=PATIENCE),
            inference.ModelReady(oip.ModelReadyRequest(name="jv"), metadata=metadata, timeout=PATIENCE),
            inference.RepositoryIndex(oip.RepositoryIndexRequest(), metadata=metadata, timeout=PATIENCE),
            stream.read(),
        ]
        for call in calls:
            code, status = await refusal(call)
            assert code == grpc.StatusCode.UNAUTHENTICATED
            assert "TOKEN" not in status.message.replace("Bearer TOKEN", "")
        reflection: Any = channel.stream_stream("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo")
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await reflection(metadata=metadata, timeout=PATIENCE).read()
        assert raised.value.code() == grpc.StatusCode.UNAUTHENTICATED


@pytest.fixture(scope="module")
def shared(bundle_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server with tokens that tests share and do not change."""
    folder = tmp_path_factory.mktemp("guarded")
    path = write_identities(folder / "identities.toml", alice={"admin": True}, bob={})
    with ServerProcess(bundle_root, folder / "log", "--tokens", str(path)) as process:
        yield process
        assert process.stop() == 0, process.log


async def test_a_known_token_is_admitted_whatever_the_case_of_its_scheme(shared: ServerProcess) -> None:
    async with channel_to(shared.address) as channel:
        stub = wire.stub_of(channel)
        for value in ("Bearer TOKEN-bob", "bearer TOKEN-bob", "BEARER  TOKEN-bob "):
            await stub.Classify(wire.classify_request([STEPS]), metadata=(("authorization", value),), timeout=PATIENCE)
        requests = [wire.open_request("a"), wire.chunk_request("a", 0, STEPS), wire.close_request("a")]
        answers = [answer async for answer in stub.Unroll(iter(requests), metadata=BOB, timeout=PATIENCE)]
        assert answers[-1].closed.snapshot.step == 3 or answers[-1].HasField("closed")
        reflection: Any = channel.stream_stream("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo")
        assert b"UnrollService" in await reflection(iter([b"\x3a\x00"]), metadata=BOB, timeout=PATIENCE).read()


async def test_probes_need_no_credentials(shared: ServerProcess) -> None:
    async with channel_to(shared.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        answer = await health.Check(health_pb2.HealthCheckRequest(), timeout=PATIENCE)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
        inference: Any = GRPCInferenceServiceStub(channel)
        assert (await inference.ServerLive(oip.ServerLiveRequest(), timeout=PATIENCE)).live
        assert (await inference.ServerReady(oip.ServerReadyRequest(), timeout=PATIENCE)).ready


async def test_a_session_belongs_to_the_identity_that_started_it(guarded: ServerProcess) -> None:
    async with channel_to(guarded.address) as channel, channel_to(admin_address(guarded)) as operator:
        stub, operations = wire.stub_of(channel), AdminServiceStub(operator)

        def advance(metadata: Any, **more: Any) -> Any:
            request = pb.AdvanceRequest(session_id="mine", values=wire.to_bytes(STEPS), **more)
            return stub.Advance(request, metadata=metadata, timeout=PATIENCE)

        await advance(ALICE, start=True, model="jv")
        code, status = await refusal(advance(BOB))
        assert (code, reasons_of(status)) == (grpc.StatusCode.NOT_FOUND, ["SESSION_UNKNOWN"])
        await advance(BOB, start=True, model="jv")
        assert (await advance(ALICE)).first_step == 3
        listed = (await operations.ListSessions(admin.ListSessionsRequest(), metadata=ALICE)).sessions
        assert {(each.owner, each.step) for each in listed} == {("alice", 6), ("bob", 3)}
        await operations.EndSession(admin.EndSessionRequest(owner="bob", session_id="mine"), metadata=ALICE)
        assert (await refusal(advance(BOB)))[0] == grpc.StatusCode.NOT_FOUND
        assert (await advance(ALICE)).first_step == 6


async def test_an_identity_has_at_most_its_quota_of_sessions(guarded: ServerProcess) -> None:
    async with channel_to(guarded.address) as channel:
        stub = wire.stub_of(channel)
        for session, metadata in (("a", LITTLE), ("a", ALICE), ("b", ALICE)):
            await stub.Advance(
                pb.AdvanceRequest(session_id=session, model="jv", start=True, values=wire.to_bytes(STEPS)),
                metadata=metadata,
                timeout=PATIENCE,
            )
        request = pb.AdvanceRequest(session_id="b", model="jv", start=True, values=wire.to_bytes(STEPS))
        code, status = await refusal(stub.Advance(request, metadata=LITTLE, timeout=PATIENCE))
        assert (code, reasons_of(status)) == (grpc.StatusCode.RESOURCE_EXHAUSTED, ["IDENTITY_LIMIT"])


async def test_only_admins_reach_the_admin_listener(guarded: ServerProcess) -> None:
    async with channel_to(admin_address(guarded)) as channel:
        stub = AdminServiceStub(channel)
        for metadata, expected in (
            (None, grpc.StatusCode.UNAUTHENTICATED),
            (bearer("TOKEN-carol"), grpc.StatusCode.UNAUTHENTICATED),
            (BOB, grpc.StatusCode.PERMISSION_DENIED),
        ):
            code, _ = await refusal(stub.ListVersions(admin.ListVersionsRequest(), metadata=metadata))
            assert code == expected
            channelz: Any = channel.unary_unary("/grpc.channelz.v1.Channelz/GetServers")
            assert (await refusal(channelz(b"", metadata=metadata)))[0] == expected
        assert (await stub.ListVersions(admin.ListVersionsRequest(), metadata=ALICE)).versions
        health = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=PATIENCE)
        assert health.status == health_pb2.HealthCheckResponse.SERVING


async def test_quotas_span_all_workers_and_affect_no_other_identity(guarded: ServerProcess) -> None:
    async def opened(address: str, metadata: Any) -> tuple[Any, Any]:
        channel = grpc.aio.insecure_channel(address, [("grpc.use_local_subchannel_pool", 1)])
        return channel, wire.stub_of(channel).Unroll(metadata=metadata)

    streams = [await opened(guarded.address, LITTLE) for _ in range(3)]
    try:
        refused = 0
        for number, (_, stream) in enumerate(streams):
            await stream.write(wire.open_request("a"))
            answer = await stream.read()
            assert answer.HasField("error") == (number == 2)
            refused += answer.HasField("error")
            if answer.HasField("error"):
                assert answer.error.code == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
                assert reasons_of(answer.error) == ["IDENTITY_LIMIT"]
                assert has_retry(answer.error)
        assert refused == 1
        for _ in range(8):
            async with channel_to(guarded.address) as channel:
                stub = wire.stub_of(channel)
                code, status = await refusal(stub.GetModel(pb.GetModelRequest(), metadata=LITTLE, timeout=PATIENCE))
                assert (code, reasons_of(status)) == (grpc.StatusCode.RESOURCE_EXHAUSTED, ["IDENTITY_LIMIT"])
                assert has_retry(status)
                await stub.Classify(wire.classify_request([STEPS]), metadata=BOB, timeout=PATIENCE)
        # A closed sequence makes room on every worker.
        await streams[0][1].write(wire.close_request("a"))
        assert (await streams[0][1].read()).HasField("closed")
        await streams[2][1].write(wire.open_request("a"))
        assert (await streams[2][1].read()).HasField("opened")
        await streams[0][1].done_writing()
        assert await streams[0][1].read() is grpc.aio.EOF
        async with channel_to(guarded.address) as channel:
            await wire.stub_of(channel).GetModel(pb.GetModelRequest(), metadata=LITTLE, timeout=PATIENCE)
    finally:
        for channel, _ in streams:
            await channel.close()


async def test_a_changed_file_takes_effect_at_once_and_ends_streams_of_withdrawn_tokens(
    guarded: ServerProcess, identities: Path
) -> None:
    async with channel_to(guarded.address) as channel:
        stub = wire.stub_of(channel)
        streams: dict[str, Any] = {name: stub.Unroll(metadata=bearer(f"TOKEN-{name}")) for name in ("alice", "bob")}
        for stream in streams.values():
            await stream.write(wire.open_request("a"))
            assert (await stream.read()).HasField("opened")
        await asyncio.to_thread(identities.write_text, "[identities.bob]\ntokens = ['TOKEN-bob']")
        await asyncio.to_thread(wait_for_log, guarded, "identities.bob.tokens: each must be")
        for stream in streams.values():
            await stream.write(wire.chunk_request("a", 0, STEPS))
            assert (await stream.read()).HasField("steps")
        write_identities(identities, alice={}, carol={})
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await asyncio.wait_for(streams["bob"].read(), PATIENCE)
        assert raised.value.code() == grpc.StatusCode.UNAUTHENTICATED
        code, _ = await refusal(stub.GetModel(pb.GetModelRequest(), metadata=BOB, timeout=PATIENCE))
        assert code == grpc.StatusCode.UNAUTHENTICATED
        await stub.GetModel(pb.GetModelRequest(), metadata=bearer("TOKEN-carol"), timeout=PATIENCE)
        await streams["alice"].write(wire.chunk_request("a", 3, STEPS))
        assert (await streams["alice"].read()).HasField("steps")
        streams["alice"].cancel()
    async with channel_to(admin_address(guarded)) as channel:
        # The supervisor, another process, reads the file for it.
        while True:
            call: Any = AdminServiceStub(channel).ListVersions(admin.ListVersionsRequest(), metadata=ALICE)
            if await call.code() == grpc.StatusCode.PERMISSION_DENIED:
                break


@pytest.mark.parametrize("text", ["[identities.alice]\ntokens = ['hunter2']", "[identities", None])
def test_a_wrong_file_ends_the_start_with_one_line(bundle_root: Path, tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "identities.toml"
    if text is not None:
        path.write_text(text)
    options = ("--listen", "127.0.0.1:0", "--tokens", str(path))
    done = run("unroll-serve", "--models", bundle_root, *options, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(f"unroll-serve: --tokens: {path}: ")
    assert len(done.stderr.splitlines()) == 1
    assert "hunter2" not in done.stderr


async def test_no_secret_and_no_value_gets_into_logs_or_metrics(bundle_root: Path, tmp_path: Path) -> None:
    token = secrets.token_urlsafe(32)
    wrong = secrets.token_urlsafe(32)
    # Values whose text and bytes are unique, and some that are refused.
    marked = np.full((5, 12), 1234.56789, np.float32)
    bad = marked.copy()
    bad[2, 3] = np.nan
    path = tmp_path / "identities.toml"
    entry = write_identities(path, alice={"admin": True}).read_text()
    digest = re.findall(r"sha256:(\w+)", entry)[0]
    path.write_text(entry.replace(digest, digest_of(token).hex()))
    options = ("--tokens", str(path), "--log-level", "debug", "--access-log", "--metrics", "127.0.0.1:0")
    with ServerProcess(bundle_root, tmp_path / "log", *options, "--admin", "127.0.0.1:0") as process:
        async with channel_to(process.address) as channel:
            stub, inference = wire.stub_of(channel), GRPCInferenceServiceStub(channel)
            for values in (marked, bad):
                for metadata in (bearer(token), bearer(wrong), (("authorization", f"Basic {token}"),)):
                    session = pb.AdvanceRequest(session_id="s", model="jv", start=True, values=wire.to_bytes(values))
                    tensor = oip.ModelInferRequest.InferInputTensor(name="input", datatype="FP32", shape=[1, 5, 12])
                    tensor.contents.fp32_contents.extend(values.ravel())
                    infer = oip.ModelInferRequest(model_name="jv", inputs=[tensor])
                    garbled = oip.ModelInferRequest(model_name="jv", raw_input_contents=[wire.to_bytes(values)])
                    stream = stub.Unroll(
                        iter([wire.open_request("k"), wire.chunk_request("k", 0, values)]), metadata=metadata
                    )
                    await asyncio.gather(
                        stub.Classify(wire.classify_request([values]), metadata=metadata),
                        stub.Advance(session, metadata=metadata),
                        inference.ModelInfer(infer, metadata=metadata),
                        inference.ModelInfer(garbled, metadata=metadata),
                        stream.read(),
                        return_exceptions=True,
                    )
            raw: Any = channel.unary_unary("/unroll.v1.UnrollService/Classify")
            with pytest.raises(grpc.aio.AioRpcError):
                await raw(wire.to_bytes(marked), metadata=bearer(token))
        (url,) = re.findall(r"metrics on (http\S+)", process.log)
        figures = await asyncio.to_thread(page_at, url)
        assert process.stop() == 0, process.log
    packed = wire.to_bytes(marked[:1, :1])
    found = [token, wrong, base64.b64encode(token.encode()).decode(), digest_of(token).hex()]
    found += ["1234.5", repr(packed)[2:-1], packed.hex()]
    assert "Classify" in process.log
    assert "unroll_" in figures
    for text in (process.log, figures):
        assert [secret for secret in found if secret in text] == []
