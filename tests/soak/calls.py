"""Calls that end: good ones small and large, ones that are cancelled, and ones that no server should take."""

import asyncio
from collections.abc import Iterator
from typing import Any

import grpc.aio
import numpy as np
from support import wire

from soak.ledger import Ledger
from soak.oracle import CLASSES, FEATURES, LONGEST, NAME, Oracle
from unroll_client import AsyncClient, UnrollError
from unroll_proto.v1 import unroll_pb2 as pb
from unroll_server.types import Float32Array

REFUSALS = {
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
}
"""How bad input may be answered."""
METHOD = "/unroll.v1.UnrollService/Classify"


def sequences(rng: np.random.Generator, count: int, longest: int = LONGEST) -> list[Float32Array]:
    """Sequences of 1 to `longest` steps."""
    return [
        rng.standard_normal((length, FEATURES), np.float32) for length in rng.integers(1, longest + 1, count).tolist()
    ]


async def classify(client: AsyncClient, oracle: Oracle, ledger: Ledger, rng: np.random.Generator, count: int) -> None:
    """Classifies up to `count` sequences a call, again and again, and checks each to the bit."""
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
    """Begins calls and streams and leaves them, at whatever moment."""
    stub = wire.stub_of(channel)
    while True:
        if rng.random() < 0.5:
            call: Any = stub.Classify(wire.classify_request(sequences(rng, 64), NAME))
        else:
            call = stub.Unroll()
            await call.write(wire.open_request("a", NAME))
            await call.write(wire.chunk_request("a", 0, rng.standard_normal((500, FEATURES), np.float32)))
        await asyncio.sleep(float(rng.exponential(0.005)))
        call.cancel()
        ledger.fault("calls cancelled")
        await asyncio.sleep(0.02)


def bad_requests(rng: np.random.Generator) -> Iterator[bytes]:
    """Messages that can't be answered: each wrong in a way of its own."""
    good = wire.classify_request(sequences(rng, 3), NAME)

    def changed(**changes: Any) -> bytes:
        request = pb.ClassifyRequest()
        request.CopyFrom(good)
        for name, value in changes.items():
            request.ClearField(name)  # type: ignore[arg-type]  # its names are literals
            if isinstance(value, list):
                getattr(request, name).extend(value)
            else:
                setattr(request, name, value)
        return request.SerializeToString()

    yield changed(model="nobody")
    yield changed(version=999)
    yield changed(lengths=[])
    yield changed(lengths=[0])
    yield changed(lengths=[2**32 - 1] * 3)
    yield changed(values=good.values[:-1])
    yield changed(values=b"")
    yield changed(values=np.full(len(good.values) // 4, np.nan, np.float32).tobytes())
    yield changed(initial_states=[pb.Snapshot(format=9)])
    yield changed(initial_states=[pb.Snapshot(format=1, model=NAME, version=1, architecture="lstm", state=[b"1"])] * 3)
    message = bytearray(good.SerializeToString())
    for _ in range(5):
        message[int(rng.integers(len(message)))] ^= int(rng.integers(1, 256))
    yield bytes(message[: int(rng.integers(1, len(message)))])
    yield rng.bytes(100)


async def bad_input(channel: grpc.aio.Channel, ledger: Ledger, rng: np.random.Generator) -> None:
    """Sends what is wrong, message by message; each must be refused as the caller's fault."""
    method: Any = channel.unary_unary(METHOD)
    while True:
        for message in bad_requests(rng):
            try:
                answer = pb.ClassifyResponse.FromString(await method(message))
            except grpc.aio.AioRpcError as error:
                if error.code() in REFUSALS:
                    ledger.right("bad input refused")
                else:
                    ledger.failure("bad input", error)
            else:
                # What a few turned bits have made may be a request all the same.
                ledger.check("bad input", len(answer.logits) % (4 * CLASSES) == 0, f"answered: {message[:50]!r}")
            ledger.fault("bad messages")
            await asyncio.sleep(0.01)
