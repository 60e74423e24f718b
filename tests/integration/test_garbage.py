"""Calls of the native transport are freed at once: the garbage collector, which stops the event loop, finds nothing."""

import json
import os
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import numpy as np
import pytest
from support import wire
from support.oip import request_of
from support.processes import ServerProcess

from unroll_client import AsyncClient
from unroll_proto.inference.service_pb2_grpc import GRPCInferenceServiceStub
from unroll_proto.sequences import Sequence
from unroll_proto.v1 import unroll_pb2 as pb
from unroll_server.transport import native

CALLS = 40
# Imported by the server's interpreter at its start: keeps what a collection finds, and tells which of it is Unroll's.
FOUND = """
import collections, gc, json, os

def of(each):
    code = getattr(each, "f_code", None)
    if code and "/unroll_" in code.co_filename:
        return f"unroll_ frame of {code.co_qualname}"
    return type(each).__module__ + "." + type(each).__qualname__

def leave(code, end=os._exit):
    gc.collect()
    counts = collections.Counter(map(of, gc.garbage))
    with open(os.environ["GARBAGE"], "w") as file:
        json.dump({name: count for name, count in counts.items() if "unroll_" in name}, file)
    end(code)

os._exit = leave
gc.set_debug(gc.DEBUG_SAVEALL)
"""


async def test_no_call_leaves_garbage(bundle_root: Path, tmp_path: Path, vowels: list[Sequence]) -> None:
    if reason := native.unavailable_reason():
        pytest.skip(reason)
    (tmp_path / "sitecustomize.py").write_text(FOUND)
    found = tmp_path / "garbage.json"
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    options: dict[str, Any] = {"env": {"PYTHONPATH": path, "GARBAGE": str(found)}, "tuning": {"max_queued_steps": 60}}
    values = [each.values for each in vowels[:CALLS]]
    with ServerProcess(bundle_root, tmp_path / "log", "--transport", "native", **options) as server:
        async with grpc.aio.insecure_channel(server.address) as channel, AsyncClient(server.address) as client:
            stub, infer = wire.stub_of(channel), GRPCInferenceServiceStub(channel)
            for index, each in enumerate(values):
                await client.classify([each], model="jv")
                await client.advance(f"session {index}", each, model="jv", start=True)
                await infer.ModelInfer(request_of(each[np.newaxis]))
                stub.Classify(wire.classify_request([each])).cancel()
            with pytest.raises(grpc.aio.AioRpcError):
                await stub.Classify(pb.ClassifyRequest(model="jv", lengths=[0]))
            # Together they may be too many for the queue.
            calls = [stub.Classify(wire.classify_request([each])) for each in values]
            codes = {await call.code() for call in calls}
            assert codes <= {grpc.StatusCode.OK, grpc.StatusCode.RESOURCE_EXHAUSTED}
            keys = [str(index) for index in range(CALLS)]
            stream = stub.Unroll()
            for key in keys:
                await stream.write(wire.open_request(key))
            await stream.write(wire.chunks_request(keys, [0] * CALLS, [each[:1] for each in values]))
            for key, each in zip(keys, values, strict=True):
                await stream.write(wire.chunk_request(key, 1, each[1:5]))
            await stream.done_writing()
            async for _ in stream:
                pass
        assert server.stop() == 0, server.log
    # A few are those of calls that the end of the server met.
    counts: dict[str, int] = json.loads(found.read_text())
    assert max(counts.values(), default=0) < CALLS // 10, counts
