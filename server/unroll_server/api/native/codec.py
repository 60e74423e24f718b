"""protobuf <-> numpy: every check of shape, size, limit and finiteness, before anything is allocated by a claim."""

import math

import numpy as np
from numpy.typing import NDArray

from unroll_engine.arrays import FLOAT32, first_not_finite, matrix, to_bytes
from unroll_engine.errors import InvalidRequestError
from unroll_engine.jobs import BatchJob, span
from unroll_engine.models.loader import Model
from unroll_engine.models.spec import Float32Array, ModelSpec, State
from unroll_engine.snapshots import decode_snapshot, encode_snapshot
from unroll_proto.v1 import unroll_pb2 as pb
from unroll_server import caller
from unroll_server.api.data_plane import check_answer
from unroll_server.config import Limits


def decode_batch(request: pb.ClassifyRequest, model: Model, limits: Limits, deadline: float = math.inf) -> BatchJob:
    """Checks a request and makes the engine's work of it, without copying its values.

    Args:
        request: As a caller sent it.
        model: What runs it.
        limits: What it may carry.
        deadline: On the engine's clock, in seconds.

    Raises:
        InvalidRequestError: a field is wrong or over a limit.
        SequenceStateError: an initial state is another model's.
    """
    spec = model.spec
    # Read once: each access to a repeated field of a message makes an object.
    given_lengths = request.lengths
    count = len(given_lengths)
    if not 1 <= count <= limits.max_sequences:
        raise InvalidRequestError(f"{count} sequences, 1 to {limits.max_sequences} allowed", "lengths")
    check_answer(spec, count, request.return_final_states, "lengths")
    offsets: NDArray[np.int64]
    if count == 1:
        # The common case, worth a shorter way: numpy takes longer to begin than Python to end.
        (total,) = given_lengths
        wrong = None if 1 <= total <= limits.max_steps else 0
        offsets = span(total)
    else:
        lengths = np.array(given_lengths, np.int64)
        bad = np.flatnonzero((lengths < 1) | (lengths > limits.max_steps))
        wrong = int(bad[0]) if len(bad) else None
        offsets = np.zeros(count + 1, np.int64)
        np.cumsum(lengths, out=offsets[1:])
        total = int(offsets[-1])
    if wrong is not None:
        problem = f"{given_lengths[wrong]} timesteps, 1 to {limits.max_steps} allowed"
        raise InvalidRequestError(problem, f"lengths[{wrong}]")
    expected = total * spec.input_size * FLOAT32.itemsize
    raw = request.values
    if len(raw) != expected:
        problem = f"{len(raw)} bytes, {expected} expected: {total} timesteps of {spec.input_size} float32 features"
        raise InvalidRequestError(problem, "values")
    values = matrix(raw, spec.input_size)
    where = first_not_finite(values)
    if where:
        step, feature = where
        index = int(np.searchsorted(offsets, step, side="right")) - 1
        place = f"sequence {index}, step {step - offsets[index]}, feature {feature}"
        raise InvalidRequestError(f"{place} is not finite", "values")
    given_states = request.initial_states
    if len(given_states) not in (0, count):
        problem = f"{len(given_states)} given, none or {count} expected: one a sequence"
        raise InvalidRequestError(problem, "initial_states")
    initial: State | None = None
    for index, snapshot in enumerate(given_states):
        if snapshot.format:
            initial = initial or spec.zero_state(count)
            state = decode_snapshot(snapshot, spec, f"initial_states[{index}]")
            for array, value in zip(initial, state, strict=True):
                array[:, index] = value
    call = caller.current.get()
    call.steps += total
    return BatchJob(model, values, offsets, initial, request.return_final_states, deadline, call.identity, call.trace)


def decode_chunk(
    raw: bytes, spec: ModelSpec, limits: Limits, field: str = "chunk.values", least: int = 1
) -> Float32Array:
    """Checks the values of a chunk and views them, [steps, input_size].

    Args:
        raw: As a caller sent them.
        spec: What is to take them.
        limits: How many they may be.
        field: Where they stand in the request.
        least: Timesteps at least.

    Raises:
        InvalidRequestError: its values are wrong or over a limit.
    """
    width = spec.input_size * FLOAT32.itemsize
    steps, rest = divmod(len(raw), width)
    if rest or not least <= steps <= limits.max_steps:
        problem = (
            f"{len(raw)} bytes, {least} to {limits.max_steps} timesteps of {width} bytes "
            f"({spec.input_size} float32 features) expected"
        )
        raise InvalidRequestError(problem, field)
    values = matrix(raw, spec.input_size)
    where = first_not_finite(values)
    if where:
        raise InvalidRequestError(f"step {where[0]} of the chunk, feature {where[1]} is not finite", field)
    return values


def encode_batch(batch: BatchJob, request: pb.ClassifyRequest) -> pb.ClassifyResponse:
    """The answer to a request whose work is done."""
    spec = batch.model.spec
    indices = batch.labels.tolist()
    response = pb.ClassifyResponse(
        model=spec.key.name,
        version=spec.key.version,
        logits=to_bytes(batch.logits),
        probabilities=to_bytes(batch.probabilities),
        label_indices=indices,
        labels=[spec.class_labels[index] for index in indices],
    )
    if batch.final_state is not None:
        # One without a format stands for the zero state, whatever else it says.
        begun = [before.step if before.format else 0 for before in request.initial_states] or [0] * batch.size
        steps = np.diff(batch.offsets).tolist()
        response.final_states.extend(
            encode_snapshot(spec, before + count, tuple(array[:, index] for array in batch.final_state))
            for index, (before, count) in enumerate(zip(begun, steps, strict=True))
        )
    return response
