"""A real server under overload and with malformed messages: it refuses them and survives."""

import asyncio
import itertools
import json
import re
import urllib.request
from collections import Counter
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import numpy as np
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from support import wire
from support.mutations import mutated
from support.operators import channel_to
from support.processes import PATIENCE, ServerProcess
from support.values import random_values
from support.waiting import until

from unroll_proto.inference import service_pb2 as oip
from unroll_proto.v1 import unroll_pb2 as pb

STEPS = random_values(5, features=12)
ALLOWED = {
    grpc.StatusCode.OK,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.ABORTED,
}
"""Statuses that any message may be answered with."""
MESSAGES: dict[str, bytes] = {
    "/unroll.v1.UnrollService/Classify": wire.classify_request([STEPS, STEPS[:2]]).SerializeToString(),
    "/unroll.v1.UnrollService/Advance": pb.AdvanceRequest(
        session_id="s", model="jv", start=True, first_step=0, values=wire.to_bytes(STEPS)
    ).SerializeToString(),
    "/unroll.v1.UnrollService/GetModel": pb.GetModelRequest(model="jv", version=1).SerializeToString(),
    "/unroll.v1.UnrollService/Unroll": wire.open_request("k").SerializeToString(),
    "/inference.GRPCInferenceService/ModelInfer": oip.ModelInferRequest(
        model_name="jv",
        inputs=[oip.ModelInferRequest.InferInputTensor(name="input", datatype="FP32", shape=[1, 5, 12])],
        raw_input_contents=[wire.to_bytes(STEPS)],
    ).SerializeToString(),
    "/inference.GRPCInferenceService/ModelStreamInfer": oip.ModelInferRequest(model_name="jv").SerializeToString(),
    "/grpc.health.v1.Health/Check": health_pb2.HealthCheckRequest(service="x").SerializeToString(),
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": b"\x3a\x01*",
}
STREAMS = {"Unroll", "ModelStreamInfer", "ServerReflectionInfo"}


async def test_health_answers_while_work_is_refused_and_work_is_answered_in_time(
    bundle_root: Path, tmp_path: Path
) -> None:
    tuning = {"max_lanes": 1, "tick_steps": 1, "max_queued_steps": 6000}
    request = wire.classify_request([np.zeros((1000, 12), np.float32)])
    statuses: Counter[grpc.StatusCode] = Counter()
    heard = asyncio.Event()

    async def ask(stub: Any, enough: asyncio.Event) -> None:
        """Callers that retry at once, ignoring the time to retry."""
        while not enough.is_set():
            try:
                answer = await stub.Classify(request, timeout=PATIENCE)
                assert answer == expected
                statuses[grpc.StatusCode.OK] += 1
            except grpc.aio.AioRpcError as error:
                statuses[error.code()] += 1
            heard.set()

    with ServerProcess(bundle_root, tmp_path / "log", tuning=tuning) as process:
        async with channel_to(process.address) as channel, channel_to(process.address) as other:
            stub = wire.stub_of(channel)
            expected = await stub.Classify(request)
            enough = asyncio.Event()
            callers = [asyncio.create_task(ask(stub, enough)) for _ in range(30)]
            checks = [health_pb2_grpc.HealthStub(each).Check for each in (channel, other)]
            # Although many are refused, some are answered, and health always is, also beside the refused calls.
            for answered in range(1, 6):
                async with asyncio.timeout(PATIENCE):
                    while statuses[grpc.StatusCode.OK] < answered or not statuses[grpc.StatusCode.RESOURCE_EXHAUSTED]:
                        heard.clear()
                        await heard.wait()
                for check in checks:
                    response = await check(health_pb2.HealthCheckRequest(), timeout=PATIENCE)
                    assert response.status == health_pb2.HealthCheckResponse.SERVING
            enough.set()
            await asyncio.gather(*callers)
            assert set(statuses) == {grpc.StatusCode.OK, grpc.StatusCode.RESOURCE_EXHAUSTED}
            # The account balances: without callers, the whole queue is free.
            whole = wire.classify_request([np.zeros((1000, 12), np.float32)] * 6)
            async with asyncio.timeout(PATIENCE):
                assert len((await stub.Classify(whole)).labels) == 6
        assert process.stop() == 0, process.log
        assert "Traceback" not in process.log


async def test_names_too_long_to_be_repeated_are_refused_for_what_they_are(server: ServerProcess) -> None:
    name = "n" * 100_000
    tensor = oip.ModelInferRequest.InferInputTensor(name=name, datatype="FP32", shape=[1, 5, 12])
    infer = oip.ModelInferRequest(model_name="jv", inputs=[tensor], raw_input_contents=[wire.to_bytes(STEPS)])
    infer.parameters[name].bool_param = True
    refused = (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND)
    async with channel_to(server.address) as channel:
        for path, message in (
            ("/unroll.v1.UnrollService/Classify", wire.classify_request([STEPS], name)),
            ("/unroll.v1.UnrollService/GetModel", pb.GetModelRequest(model=name)),
            ("/unroll.v1.UnrollService/Advance", pb.AdvanceRequest(session_id=name)),
            ("/inference.GRPCInferenceService/ModelInfer", infer),
            ("/inference.GRPCInferenceService/ModelMetadata", oip.ModelMetadataRequest(name=name, version="1")),
            ("/inference.GRPCInferenceService/ModelMetadata", oip.ModelMetadataRequest(name="jv", version=name)),
        ):
            assert await status_of(channel, path, message.SerializeToString()) in refused, path


def told(process: ServerProcess, figure: str) -> float:
    """Returns a figure of the server's metrics by the prefix of its line."""
    (url,) = re.findall(r"metrics on (http\S+)", process.log)
    with urllib.request.urlopen(url, timeout=PATIENCE) as answer:  # noqa: S310
        (value,) = re.findall(rf"^{re.escape(figure)} (\S+)$", answer.read().decode(), re.MULTILINE)
    return float(value)


def names_in_access_log(process: ServerProcess, log_format: str, code: str) -> list[str]:
    """Returns the request ids of the logged calls that ended with a code."""
    if log_format == "json":
        every = map(json.loads, process.log.splitlines())
        return [line["request_id"] for line in every if line["message"] == "call" and line["code"] == code]
    form = r"^[-\d]+ [:\d]+,\d{3} INFO unroll_server\.access: call request_id=(.+) method=\S+ code="
    return [json.loads(name) for name in re.findall(f"{form}{code} seconds=", process.log, re.MULTILINE)]


@pytest.mark.parametrize("log_format", ["text", "json"])
async def test_what_can_not_be_done_in_time_is_refused_in_full_form(
    log_format: str, bundle_root: Path, tmp_path: Path
) -> None:
    observed = ("--metrics", "127.0.0.1:0", "--access-log", "--log-format", log_format)
    tuning = {"max_lanes": 1, "tick_steps": 1}
    request = wire.classify_request([np.zeros((6000, 12), np.float32)])
    # A name that must be quoted in both log formats.
    names = (f'over="{number}\\' for number in itertools.count())
    refused: dict[str, grpc.aio.AioRpcError] = {}
    answered = 0
    heard = asyncio.Event()
    enough = asyncio.Event()

    async def ask(stub: Any) -> None:
        nonlocal answered
        while not enough.is_set():
            name = next(names)
            try:
                await stub.Classify(request, timeout=1.5, metadata=(("x-request-id", name),))
                answered += 1
            except grpc.aio.AioRpcError as error:
                if error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED:
                    refused[name] = error
            heard.set()

    with ServerProcess(bundle_root, tmp_path / "log", *observed, tuning=tuning) as process:
        async with channel_to(process.address) as channel, channel_to(process.address) as other:
            stub = wire.stub_of(channel)
            callers = [asyncio.create_task(ask(stub)) for _ in range(60)]
            async with asyncio.timeout(PATIENCE):
                while not answered or not refused:
                    heard.clear()
                    await heard.wait()
            check = health_pb2_grpc.HealthStub(other).Check
            response = await check(health_pb2.HealthCheckRequest(), timeout=PATIENCE)
            assert response.status == health_pb2.HealthCheckResponse.SERVING
            enough.set()
            await asyncio.gather(*callers)
            for name, error in refused.items():
                status = wire.details_of(error)
                info, delay = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
                assert status.message == error.details()
                assert status.details[0].Unpack(info)
                assert info.reason == "DEADLINE_TOO_NEAR"
                assert status.details[1].Unpack(delay)
                trailers = dict(error.trailing_metadata() or ())
                assert int(trailers["grpc-retry-pushback-ms"]) == delay.retry_delay.ToMilliseconds() > 0
                assert trailers["x-request-id"] == name
            refusals = 'unroll_refused_total{cause="deadline"}'
            await until(lambda: told(process, refusals) >= len(refused))
            # Refusals end soon after the overload.
            enough.clear()
            request, answered = wire.classify_request([np.zeros((1, 12), np.float32)]), 0
            caller = asyncio.create_task(ask(stub))
            async with asyncio.timeout(PATIENCE):
                while not answered:
                    heard.clear()
                    await heard.wait()
            enough.set()
            await caller
        assert process.stop() == 0, process.log
        assert "Traceback" not in process.log
        in_log = Counter(names_in_access_log(process, log_format, "RESOURCE_EXHAUSTED"))
        assert {name: in_log[name] for name in refused} == dict.fromkeys(refused, 1)


async def test_a_queue_full_of_bytes_says_so(bundle_root: Path, tmp_path: Path) -> None:
    # Room for one of the requests.
    tuning = {"max_lanes": 1, "tick_steps": 1, "max_queued_bytes": 300000}
    request = wire.classify_request([np.zeros((6000, 12), np.float32)])
    enough = asyncio.Event()
    refused: list[grpc.aio.AioRpcError] = []

    async def ask(stub: Any) -> None:
        while not enough.is_set():
            try:
                await stub.Classify(request, timeout=PATIENCE)
            except grpc.aio.AioRpcError as error:
                refused.append(error)
                if "300000 bytes at most" in (error.details() or ""):
                    enough.set()

    with ServerProcess(bundle_root, tmp_path / "log", "--metrics", "127.0.0.1:0", tuning=tuning) as process:
        async with channel_to(process.address) as channel, asyncio.timeout(PATIENCE):
            await asyncio.gather(*(ask(wire.stub_of(channel)) for _ in range(10)))
            figure = 'unroll_refused_total{cause="bytes"}'
            await until(lambda: told(process, figure) >= len(refused))
        for error in refused:
            info = error_details_pb2.ErrorInfo()
            assert wire.details_of(error).details[0].Unpack(info)
            assert info.reason == "QUEUED_BYTES"
        assert process.stop() == 0, process.log


@pytest.mark.parametrize("path", MESSAGES)
def test_messages_that_are_nearly_right_harm_nobody(server: ServerProcess, path: str) -> None:
    good = wire.classify_request([STEPS])

    async def send(messages: list[bytes]) -> None:
        async with channel_to(server.address) as channel:
            stub = wire.stub_of(channel)
            expected = await stub.Classify(good)
            statuses = await asyncio.gather(*(status_of(channel, path, message) for message in messages))
            assert set(statuses) <= ALLOWED, list(zip(statuses, messages, strict=True))
            assert await stub.Classify(good) == expected

    @settings(
        max_examples=4,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.lists(mutated(st.just(MESSAGES[path])), min_size=20, max_size=40))
    def run(messages: list[bytes]) -> None:
        asyncio.run(send(messages))

    before = server.log
    run()
    assert "Traceback" not in server.log.removeprefix(before)


async def status_of(channel: grpc.aio.Channel, path: str, message: bytes) -> grpc.StatusCode:
    """Returns the status of a message, or of the first answer of a stream."""
    try:
        if path.rpartition("/")[2] in STREAMS:
            many: Any = channel.stream_stream(path)
            async for _ in many(iter([message]), timeout=PATIENCE):
                pass
        else:
            one: Any = channel.unary_unary(path)
            await one(message, timeout=PATIENCE)
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK
