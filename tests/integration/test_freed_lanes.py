"""Abandoned calls: their remaining work is dropped, and their lanes are freed."""

import asyncio
import re
import urllib.request
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families
from support import wire
from support.processes import PATIENCE, ServerProcess

from unroll_proto.inference import service_pb2 as oip
from unroll_proto.inference.service_pb2_grpc import GRPCInferenceServiceStub
from unroll_proto.v1 import unroll_pb2 as pb

STEPS = 60_000
"""Steps of a sequence that takes some seconds, a step at a time."""
LONG = np.zeros((STEPS, 12), np.float32)
SHORT = wire.classify_request([LONG[:3]])


@pytest.fixture(scope="module")
def process(bundle_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server with one lane and ticks of one step, so that later calls wait."""
    log = tmp_path_factory.mktemp("one-lane") / "log"
    # onnxruntime, which is slow enough: the kernel would finish before a deadline.
    options = ("--runtime", "onnx", "--metrics", "127.0.0.1:0")
    with ServerProcess(bundle_root, log, *options, tuning={"max_lanes": 1, "tick_steps": 1}) as process:
        yield process
        assert process.stop() == 0, process.log


@pytest.fixture
async def channel(process: ServerProcess) -> AsyncIterator[grpc.aio.Channel]:
    async with grpc.aio.insecure_channel(process.address) as channel:
        yield channel


async def figures_of(process: ServerProcess) -> dict[str, float]:
    """Returns timesteps computed and queued, and dropped sequences by cause."""
    (url,) = re.findall(r'metrics on (http[^\s"]+)', process.log)

    def get() -> str:
        with urllib.request.urlopen(url, timeout=30) as answer:  # noqa: S310
            return str(answer.read().decode())

    families = {each.name: each for each in text_string_to_metric_families(await asyncio.to_thread(get))}
    real = [each.value for each in families["unroll_steps"].samples if each.labels["kind"] == "real"]
    dropped = {each.labels["cause"]: each.value for each in families["unroll_dropped_sequences"].samples}
    return {"computed": sum(real), "queued": families["unroll_queued_steps"].samples[0].value, **dropped}


def classify(channel: grpc.aio.Channel, timeout: float | None) -> Any:
    return wire.stub_of(channel).Classify(wire.classify_request([LONG, LONG]), timeout=timeout)


def advance(channel: grpc.aio.Channel, timeout: float | None) -> Any:
    request = pb.AdvanceRequest(session_id="s", model="jv", start=True, values=wire.to_bytes(LONG))
    return wire.stub_of(channel).Advance(request, timeout=timeout)


def infer(channel: grpc.aio.Channel, timeout: float | None) -> Any:
    tensor = oip.ModelInferRequest.InferInputTensor(name="input", datatype="FP32", shape=[2, *LONG.shape])
    request = oip.ModelInferRequest(
        model_name="jv", inputs=[tensor], raw_input_contents=[wire.to_bytes(np.stack([LONG, LONG]))]
    )
    return GRPCInferenceServiceStub(channel).ModelInfer(request, timeout=timeout)


@pytest.mark.parametrize("cause", ["cancelled", "expired"])
@pytest.mark.parametrize(("ask", "waiting"), [(classify, {1}), (infer, {1}), (advance, {0, 1})])
async def test_a_call_that_is_given_up_frees_its_lane(
    process: ServerProcess, channel: grpc.aio.Channel, ask: Any, waiting: set[int], cause: str
) -> None:
    stub = wire.stub_of(channel)
    await stub.Classify(SHORT, timeout=PATIENCE)
    before = await figures_of(process)
    call = ask(channel, 0.5 if cause == "expired" else None)
    ending = asyncio.ensure_future(call.code())
    while cause == "cancelled" and (await figures_of(process))["computed"] == before["computed"]:
        assert not ending.done()
    if cause == "cancelled":
        call.cancel()
    assert await ending is (grpc.StatusCode.CANCELLED if cause == "cancelled" else grpc.StatusCode.DEADLINE_EXCEEDED)
    # This one would wait behind its remaining work.
    await stub.Classify(SHORT, timeout=PATIENCE)
    after = await figures_of(process)
    while after["queued"]:
        after = await figures_of(process)
    assert after["computed"] - before["computed"] < STEPS
    # Of two sequences one had the lane and the other waited. A session's one sequence waits only between its pieces.
    # Either the cancellation or the deadline is noticed first.
    assert sum(after[each] - before[each] for each in ("cancelled", "expired")) in waiting


async def test_a_stream_that_is_given_up_frees_its_lanes(process: ServerProcess, channel: grpc.aio.Channel) -> None:
    stub: Any = wire.stub_of(channel)
    before = await figures_of(process)
    call = stub.Unroll()
    for key in ("a", "b"):
        await call.write(wire.open_request(key))
        await call.write(wire.chunk_request(key, 0, LONG))
    while (await call.read()).WhichOneof("event") != "steps":
        pass
    call.cancel()
    await stub.Classify(SHORT, timeout=PATIENCE)
    after = await figures_of(process)
    while after["queued"]:
        after = await figures_of(process)
    assert after["computed"] - before["computed"] < STEPS
