"""Unary calls: valid ones of all sizes, cancelled ones, and invalid ones."""

import asyncio
from collections.abc import Iterator
from typing import Any

import grpc.aio
import numpy as np
from google.protobuf.message import Message
from support import oip, wire

from soak.ledger import Ledger
from soak.oracle import FEATURES, LONGEST, NAME, Oracle
from unroll_client import AsyncClient, UnrollError
from unroll_engine.models.spec import Float32Array
from unroll_proto.inference import service_pb2 as pb_infer
from unroll_proto.inference.service_pb2_grpc import GRPCInferenceServiceStub
from unroll_proto.v1 import unroll_pb2 as pb

REFUSALS = {
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
}
"""Allowed statuses for bad input."""
CLASSIFY = "/unroll.v1.UnrollService/Classify"
ADVANCE = "/unroll.v1.UnrollService/Advance"
INFER = "/inference.GRPCInferenceService/ModelInfer"


def sequences(rng: np.random.Generator, count: int, longest: int = LONGEST) -> list[Float32Array]:
    """Draws sequences of 1 to `longest` steps."""
    return [
        rng.standard_normal((length, FEATURES), np.float32) for length in rng.integers(1, longest + 1, count).tolist()
    ]


async def classify(client: AsyncClient, oracle: Oracle, ledger: Ledger, rng: np.random.Generator, count: int) -> None:
    """Classifies up to `count` sequences per call, repeatedly, and checks the bits of each."""
    kind = "unary" if count < 10 else "bulk"
    while True:
        batch = sequences(rng, int(rng.integers(1, count + 1)))
        try:
            answer = await client.classify(batch, model=NAME)
        except UnrollError as error:
            ledger.failure(kind, error)
            await asyncio.sleep(0.05)
            continue
        for values, logits in zip(batch, answer.logits, strict=True):
            expected = oracle.answer(answer.version, values)[0][-1]
            ledger.check(kind, logits.tobytes() == expected.tobytes(), f"{len(values)} steps, version {answer.version}")


async def cancel(channel: grpc.aio.Channel, ledger: Ledger, rng: np.random.Generator) -> None:
    """Starts calls and streams and cancels them at random moments."""
    unroll, infer = wire.stub_of(channel), GRPCInferenceServiceStub(channel)
    while True:
        values = rng.standard_normal((500, FEATURES), np.float32)
        padded = oip.request_of(values[np.newaxis], model=NAME, sequence_id="left", sequence_start=True)
        call: Any
        match int(rng.integers(4)):
            case 0:
                call = unroll.Classify(wire.classify_request(sequences(rng, 64), NAME))
            case 1:
                call = unroll.Unroll()
                await call.write(wire.open_request("a", NAME))
                await call.write(wire.chunk_request("a", 0, values))
            case 2:
                call = infer.ModelInfer(padded)
            case 3:
                call = infer.ModelStreamInfer()
                await call.write(padded)
                await call.write(padded)
        await asyncio.sleep(float(rng.exponential(0.005)))
        call.cancel()
        ledger.fault("calls cancelled")
        await asyncio.sleep(0.02)


def bad_requests(rng: np.random.Generator) -> Iterator[tuple[str, bytes, bool]]:
    """Returns methods, wrong messages, and True for messages that must be refused."""
    values = sequences(rng, 1)[0]
    classify_request = wire.classify_request(sequences(rng, 3), NAME)
    advance = pb.AdvanceRequest(session_id="bad", model=NAME, start=True, values=wire.to_bytes(values))
    infer = oip.request_of(values[np.newaxis], model=NAME)
    nan = np.full(values.shape, np.nan, np.float32)
    snapshot = pb.Snapshot(format=1, model=NAME, version=1, architecture="lstm", state=[b"1"])
    wrong: list[tuple[str, Message, list[dict[str, Any]]]] = [
        (
            CLASSIFY,
            classify_request,
            [
                {"model": "nobody"},
                {"version": 999},
                {"lengths": []},
                {"lengths": [0]},
                {"lengths": [2**32 - 1] * 3},
                {"values": classify_request.values[:-1]},
                {"values": b""},
                {"lengths": [len(values)], "values": nan.tobytes()},
                {"initial_states": [pb.Snapshot(format=9)]},
                {"initial_states": [snapshot] * 3},
            ],
        ),
        (
            ADVANCE,
            advance,
            [
                {"session_id": ""},
                {"session_id": "x" * 129},
                {"start": False, "session_id": "nobody"},
                {"model": "nobody"},
                {"first_step": 7},
                {"values": advance.values[:-1]},
                {"values": nan.tobytes()},
                {"initial_state": snapshot},
            ],
        ),
        (
            INFER,
            infer,
            [
                {"model_name": "nobody"},
                {"model_version": "newest"},
                {"inputs": []},
                {"inputs": [*infer.inputs, *infer.inputs]},
                {"outputs": [pb_infer.ModelInferRequest.InferRequestedOutputTensor(name="secrets")]},
                {"raw_input_contents": [b"1"]},
                {"raw_input_contents": [nan.tobytes()]},
            ],
        ),
    ]
    for method, good, changes in wrong:
        yield from ((method, _changed(good, each), True) for each in changes)
        message = bytearray(good.SerializeToString())
        for _ in range(5):
            message[int(rng.integers(len(message)))] ^= int(rng.integers(1, 256))
        yield method, bytes(message[: int(rng.integers(1, len(message)))]), False
        yield method, rng.bytes(100), False


def _changed(good: Message, changes: dict[str, Any]) -> bytes:
    request = type(good)()
    request.CopyFrom(good)
    for name, value in changes.items():
        request.ClearField(name)
        if isinstance(value, list):
            getattr(request, name).extend(value)
        elif isinstance(value, Message):
            getattr(request, name).CopyFrom(value)
        else:
            setattr(request, name, value)
    return request.SerializeToString()


async def bad_input(channel: grpc.aio.Channel, ledger: Ledger, rng: np.random.Generator) -> None:
    """Sends wrong messages; each must be refused as the caller's fault."""
    methods: dict[str, Any] = {path: channel.unary_unary(path) for path in (CLASSIFY, ADVANCE, INFER)}
    while True:
        for path, message, surely in bad_requests(rng):
            try:
                await methods[path](message)
            except grpc.aio.AioRpcError as error:
                if error.code() in REFUSALS:
                    ledger.right("bad input refused")
                else:
                    ledger.failure("bad input", error)
            else:
                # A few flipped bits may still be a valid request.
                ledger.check("bad input that was good", not surely, f"answered: {path} {message[:50]!r}")
            ledger.fault("bad messages")
            await asyncio.sleep(0.01)
