"""Classify requests of random sequences."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from unroll_bench.load.answers import ClassifyCheck
from unroll_bench.load.lengths import Lengths
from unroll_bench.load.result import Call
from unroll_client import ModelInfo
from unroll_proto.v1 import unroll_pb2 as pb

CLASSIFY = "/unroll.v1.UnrollService/Classify"

# Each distinct request is sent many times, so that answers can be compared; more give a finer mix of lengths.
DISTINCT = 256
MOST_BYTES = 256 << 20


def classify_request(sequences: Sequence[NDArray[np.float32]], model: str, version: int = 0) -> bytes:
    """Serializes a ClassifyRequest of sequences, float32 [steps, features] each; version 0 is the newest."""
    values = np.concatenate(sequences).astype("<f4", copy=False)
    lengths = [len(sequence) for sequence in sequences]
    return pb.ClassifyRequest(
        model=model, version=version, lengths=lengths, values=values.tobytes()
    ).SerializeToString()


def random_calls(lengths: Lengths, model: ModelInfo, batch: int) -> tuple[list[Call], float]:
    """Makes requests of standard normal sequences: `DISTINCT`, or as many as 256 MiB hold.

    Args:
        lengths: Lengths of the sequences.
        model: The model to ask. Requests name its version, so that a newer one doesn't change the answers.
        batch: Sequences of a request.

    Returns:
        The calls, each with its check, and the mean timesteps of one.

    Raises:
        ValueError: a request exceeds the server's limits.
    """
    generator = np.random.default_rng(0)
    calls: list[Call] = []
    steps = size = 0
    while len(calls) < DISTINCT and size < MOST_BYTES:
        drawn = lengths.draw(generator, batch).tolist()
        arrays = [generator.standard_normal((length, model.input_size), dtype=np.float32) for length in drawn]
        message = classify_request(arrays, model.name, model.version)
        if len(message) > model.limits.max_message_bytes:
            raise ValueError(
                f"--batch: a request of {batch} sequences is {len(message)} bytes, "
                f"the server takes {model.limits.max_message_bytes}"
            )
        calls.append(Call(CLASSIFY, message, ClassifyCheck(batch, model.output_size, model.bitwise)))
        steps += sum(drawn)
        size += len(message)
    return calls, steps / len(calls)
