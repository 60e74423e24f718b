"""Callers that do not read their answers: the kept answers are bounded, and others are served."""

import asyncio
import re
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from prometheus_client.parser import text_string_to_metric_families
from support import wire
from support.memory import resident_bytes
from support.operators import channel_to
from support.processes import PATIENCE, ServerProcess
from support.values import random_values

from unroll_proto.inference import service_pb2 as oip
from unroll_proto.inference.service_pb2_grpc import GRPCInferenceServiceStub
from unroll_server.api.native import answers
from unroll_server.api.native.joiner import JOINED_STEPS
from unroll_server.api.oip import stream as inference_stream

SEQUENCES = 250
STEPS = 1024
"""Steps of each; all their states are 131 MB."""
STATE = 128 * 4
"""Bytes of one answer."""
VALUES = random_values(STEPS, features=12)


@pytest.fixture(scope="module")
def process(bundle_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server with metrics of its work."""
    log = tmp_path_factory.mktemp("metered") / "log"
    with ServerProcess(bundle_root, log, "--metrics", "127.0.0.1:0") as process:
        yield process
        assert process.stop() == 0, process.log


def steps_of(process: ServerProcess) -> int:
    """Returns the timesteps that the server has computed."""
    (url,) = re.findall(r'metrics on (http[^\s"]+)', process.log)
    with urllib.request.urlopen(url, timeout=30) as answer:  # noqa: S310
        families = {each.name: each for each in text_string_to_metric_families(answer.read().decode())}
    return sum(int(each.value) for each in families["unroll_steps"].samples if each.labels["kind"] == "real")


async def unroll(channel: grpc.aio.Channel) -> tuple[Any, list[Any], int]:
    call: Any = wire.stub_of(channel).Unroll()
    for key in range(SEQUENCES):
        await call.write(wire.open_request(str(key), return_logits=False))
        assert (await call.read()).HasField("opened")
    return call, [wire.chunk_request(str(key), 0, VALUES) for key in range(SEQUENCES)], answers.MAX_UNSENT_BYTES


async def unroll_together(channel: grpc.aio.Channel) -> tuple[Any, list[Any], int]:
    """The same in messages for 64 sequences, each with as many steps as are answered together."""
    call, _, most = await unroll(channel)
    requests = []
    for begin in range(0, STEPS, JOINED_STEPS):
        for first in range(0, SEQUENCES, 64):
            keys = [str(key) for key in range(first, min(first + 64, SEQUENCES))]
            values = [VALUES[begin : begin + JOINED_STEPS]] * len(keys)
            requests.append(wire.chunks_request(keys, [begin] * len(keys), values))
    return call, requests, most


async def infer(channel: grpc.aio.Channel) -> tuple[Any, list[Any], int]:
    tensor = oip.ModelInferRequest.InferInputTensor(name="input", datatype="FP32", shape=[1, *VALUES.shape])
    output = oip.ModelInferRequest.InferRequestedOutputTensor(name="states")
    request = oip.ModelInferRequest(
        model_name="jv", inputs=[tensor], outputs=[output], raw_input_contents=[wire.to_bytes(VALUES)]
    )
    return GRPCInferenceServiceStub(channel).ModelStreamInfer(), [request] * SEQUENCES, inference_stream.MAX_BYTES


@pytest.mark.parametrize("begin", [unroll, unroll_together, infer])
async def test_what_is_computed_for_a_stream_that_is_not_read_is_bounded_in_bytes(
    process: ServerProcess, begin: Any
) -> None:
    before, size = steps_of(process), resident_bytes(process.process.pid)
    # An adaptive window of the client would grow by megabytes, which the transport then holds.
    fixed_window = [("grpc.http2.bdp_probe", 0)]
    async with (
        grpc.aio.insecure_channel(process.address, options=fixed_window) as slow,
        channel_to(process.address) as good,
    ):
        call, requests, most = await begin(slow)

        async def write() -> None:
            for request in requests:
                await call.write(request)

        writing = asyncio.create_task(write())
        asked = 0
        stub = wire.stub_of(good)
        expected = await stub.Classify(wire.classify_request([VALUES]), timeout=PATIENCE)
        # Until the caller's work stands still while others continue, although it would come before theirs.
        latest = -1
        while latest != (computed := await asyncio.to_thread(steps_of, process) - before - STEPS * (asked + 1)):
            latest = computed
            for _ in range(20):
                asked += 1
                assert await stub.Classify(wire.classify_request([VALUES]), timeout=PATIENCE) == expected
        # On top of it come a piece of a chunk or one answer; one that is being written; and those in the transport,
        # one in its buffer and the window of 64 KiB. Each is 512 KiB at most.
        assert 2**20 < computed * STATE < most + 4 * STEPS * STATE
        assert resident_bytes(process.process.pid) - size < 4 * most
        writing.cancel()
        call.cancel()
        await asyncio.gather(writing, return_exceptions=True)
        assert await stub.Classify(wire.classify_request([VALUES]), timeout=PATIENCE) == expected
