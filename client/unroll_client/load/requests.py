"""Classify requests to drive a server with: made up, or from a file."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from unroll_client._types import ModelInfo
from unroll_client.load.answers import ClassifyCheck
from unroll_client.load.lengths import Lengths
from unroll_client.load.result import Call
from unroll_proto.sequences import SequenceError, read_sequences
from unroll_proto.v1 import unroll_pb2 as pb

PATH = "/unroll.v1.UnrollService/Classify"

# Each distinct request is sent many times, so that answers can be compared; more of them make the lengths' mix finer.
DISTINCT = 256
MOST_BYTES = 256 << 20

Array = NDArray[np.float32]


def random_sequences(generator: np.random.Generator, lengths: Lengths, features: int, most: int) -> Iterator[Array]:
    """Standard normal sequences, float32 [steps, features], without end; `most` steps at most."""
    while True:
        for length in np.minimum(lengths.draw(generator, DISTINCT), most).tolist():
            yield generator.standard_normal((length, features), dtype=np.float32)


def file_sequences(path: Path, model: ModelInfo) -> Iterator[Array]:
    """A file's sequences, float32 [steps, features].

    Raises:
        SequenceError: the file, or a sequence in it, can't be used with the model.
    """
    for sequence in read_sequences(path):
        steps, features = sequence.values.shape
        if features != model.input_size:
            what = f"{features} features, model {model.name} has {model.input_size}"
            raise SequenceError(path, what, row=sequence.row, column="sequence")
        if steps > model.limits.max_steps:
            what = f"{steps} steps, the server takes {model.limits.max_steps}"
            raise SequenceError(path, what, row=sequence.row, column="sequence")
        yield sequence.values


def classify_calls(
    sequences: Iterator[Array], model: ModelInfo, batch: int, most: int | None
) -> tuple[list[Call], int]:
    """Makes requests of `batch` sequences, the last of what is left.

    Args:
        sequences: Taken until they end, or `most` requests or 256 MiB are made.
        model: What they ask; the version is named, so that a newer one doesn't change the answers.
        batch: Sequences of a request.
        most: Requests.

    Returns:
        The calls, each checked on its own, and the timesteps in all.

    Raises:
        ValueError: a request is larger than the server takes.
    """
    calls: list[Call] = []
    total = size = 0
    while (most is None or len(calls) < most) and size < MOST_BYTES:
        arrays = list(islice(sequences, batch))
        if not arrays:
            break
        values = np.concatenate(arrays).astype("<f4", copy=False)
        request = pb.ClassifyRequest(
            model=model.name,
            version=model.version,
            lengths=[len(array) for array in arrays],
            values=values.tobytes(),
        )
        message = request.SerializeToString()
        if len(message) > model.limits.max_message_bytes:
            raise ValueError(
                f"--batch: a request of {len(arrays)} sequences is {len(message)} bytes, "
                f"the server takes {model.limits.max_message_bytes}"
            )
        calls.append(Call(PATH, message, ClassifyCheck(len(arrays), model.output_size, model.bitwise)))
        total += len(values)
        size += len(message)
    return calls, total
