"""The Open Inference Protocol: batches of any lengths, and streams of many sequences."""

import asyncio

import grpc.aio
import numpy as np
from support import oip

from soak.calls import sequences
from soak.ledger import Ledger
from soak.oracle import CLASSES, FEATURES, HIDDEN, NAME, Oracle
from unroll_engine.models.spec import Float32Array
from unroll_proto.inference import service_pb2 as pb
from unroll_proto.inference.service_pb2_grpc import GRPCInferenceServiceStub

BATCH = 20
"""Sequences of the largest request."""
TOGETHER = 5
"""Sequences that share a stream."""
PIECE = 20
"""Timesteps of the largest request of a sequence."""


async def infer(channel: grpc.aio.Channel, oracle: Oracle, ledger: Ledger, rng: np.random.Generator) -> None:
    """Sends batches, padded with NaN, repeatedly."""
    method = GRPCInferenceServiceStub(channel).ModelInfer
    while True:
        batch = sequences(rng, int(rng.integers(1, BATCH + 1)))
        lengths = np.array([len(values) for values in batch], "<i4")
        padded = np.full((len(batch), lengths.max(), FEATURES), np.nan, np.float32)
        for row, values in zip(padded, batch, strict=True):
            row[: len(values)] = values
        request = oip.request_of(padded, "logits", "states", model=NAME)
        request.inputs.add(name="lengths", datatype="INT32", shape=[len(lengths)])
        request.raw_input_contents.append(lengths.tobytes())
        try:
            response = await method(request)
        except grpc.aio.AioRpcError as error:
            ledger.failure("ModelInfer", error)
            await asyncio.sleep(0.05)
            continue
        version, outputs = int(response.model_version), oip.outputs_of(response)
        for index, values in enumerate(batch):
            logits, states = oracle.answer(version, values)
            expected = np.zeros((lengths.max(), HIDDEN), np.float32)
            expected[: len(values)] = states
            same = outputs["logits"][index].tobytes() == logits[-1].tobytes()
            same &= outputs["states"][index].tobytes() == expected.tobytes()
            ledger.check("ModelInfer", same, f"{len(values)} steps, version {version}")
        await asyncio.sleep(float(rng.exponential(0.05)))


async def stream(
    channel: grpc.aio.Channel, oracle: Oracle, ledger: Ledger, rng: np.random.Generator, place: int
) -> None:
    """Sends several sequences over a stream, piece by piece in random order, and reads all answers.

    Args:
        channel: Channel to the server.
        oracle: Expected answers.
        ledger: Counts.
        rng: Makes the sequences, their pieces and their order.
        place: Number of this caller, which makes its ids unique.
    """
    stub = GRPCInferenceServiceStub(channel)
    while True:
        batch = sequences(rng, int(rng.integers(1, TOGETHER + 1)))
        requests = _requests(rng, batch, place)
        try:
            responses = [response async for response in stub.ModelStreamInfer(iter(requests))]
        except grpc.aio.AioRpcError as error:
            ledger.failure("ModelStreamInfer", error)
            continue
        errors = {response.error_message for response in responses if response.error_message}
        ledger.check("ModelStreamInfer streams", not errors, "; ".join(sorted(errors)))
        if not errors:
            for index, values in enumerate(batch):
                _check(index, values, [response.infer_response for response in responses], oracle, ledger)
        await asyncio.sleep(float(rng.exponential(0.2)))


def _requests(rng: np.random.Generator, batch: list[Float32Array], place: int) -> list[pb.ModelInferRequest]:
    """Yields all pieces of all sequences, mixed but in order within each, with the sequence's number."""
    waiting = []
    for index, values in enumerate(batch):
        cuts = np.flatnonzero(rng.random(len(values) - 1) < 2 / PIECE) + 1
        pieces = np.split(values, cuts)
        # Some ids are strings and some are numbers; 0 would be none.
        number = place * TOGETHER + index + 1
        sequence_id: str | int = f"sequence {number}" if index % 2 else number
        waiting.append(
            [
                oip.request_of(
                    piece[np.newaxis],
                    *("logits", "states"),
                    model=NAME,
                    request_id=str(index),
                    sequence_id=sequence_id,
                    sequence_start=part == 0,
                    sequence_end=part == len(pieces) - 1,
                )
                for part, piece in enumerate(pieces)
            ]
        )
    order = rng.permutation([index for index, requests in enumerate(waiting) for _ in requests])
    return [waiting[index].pop(0) for index in order.tolist()]


def _check(
    index: int, values: Float32Array, responses: list[pb.ModelInferResponse], oracle: Oracle, ledger: Ledger
) -> None:
    """Compares the answers of one sequence with those of a run alone: every step once, in order, bit for bit."""
    own = [response for response in responses if response.id == str(index)]
    outputs = [oip.outputs_of(response) for response in own]
    states = np.concatenate([np.zeros((0, HIDDEN), np.float32), *(each["states"][0] for each in outputs)])
    ledger.lost += abs(len(values) - len(states))
    versions = {response.model_version for response in own}
    same = len(versions) == 1
    if same:
        expected_logits, expected = oracle.answer(int(own[0].model_version), values)
        ends = np.cumsum([each["states"].shape[1] for each in outputs]) - 1
        logits = np.concatenate([each["logits"].reshape(1, CLASSES) for each in outputs])
        same = states.tobytes() == expected.tobytes() and logits.tobytes() == expected_logits[ends].tobytes()
    ledger.check("ModelStreamInfer sequences", same, f"{len(values)} steps, versions {sorted(versions)}")
