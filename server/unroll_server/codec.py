"""protobuf <-> numpy: every check of shape, size, limit and finiteness, before anything is allocated by a claim."""

import numpy as np
from numpy.typing import NDArray

from unroll_proto.v1 import unroll_pb2 as pb
from unroll_server.config import Limits
from unroll_server.errors import InvalidRequestError, SequenceStateError
from unroll_server.models import Model
from unroll_server.types import Float32Array, ModelSpec, State
from unroll_server.work import Batch

SNAPSHOT_FORMAT = 1
MAX_KEY_BYTES = 128
MAX_STEP = 2**62
"""Room for a sequence to go on: step numbers are uint64 on the wire."""

_WIRE = np.dtype("<f4")


def decode_batch(request: pb.ClassifyRequest, model: Model, limits: Limits) -> Batch:
    """Checks a request and makes the engine's work of it, without copying its values.

    Raises:
        InvalidRequestError: a field is wrong or over a limit.
        SequenceStateError: an initial state is another model's.
    """
    spec = model.spec
    count = len(request.lengths)
    if not 1 <= count <= limits.max_sequences:
        raise InvalidRequestError(f"{count} sequences, 1 to {limits.max_sequences} allowed", "lengths")
    lengths = np.array(request.lengths, np.int64)
    wrong = np.flatnonzero((lengths < 1) | (lengths > limits.max_steps))
    if len(wrong):
        index = int(wrong[0])
        problem = f"{lengths[index]} timesteps, 1 to {limits.max_steps} allowed"
        raise InvalidRequestError(problem, f"lengths[{index}]")
    offsets = np.zeros(count + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    expected = int(offsets[-1]) * spec.input_size * _WIRE.itemsize
    raw = request.values
    if len(raw) != expected:
        problem = (
            f"{len(raw)} bytes, {expected} expected: {offsets[-1]} timesteps of {spec.input_size} float32 features"
        )
        raise InvalidRequestError(problem, "values")
    values = _matrix(raw, spec.input_size)
    where = _first_not_finite(values)
    if where:
        step, feature = where
        index = int(np.searchsorted(offsets, step, side="right")) - 1
        place = f"sequence {index}, step {step - offsets[index]}, feature {feature}"
        raise InvalidRequestError(f"{place} is not finite", "values")
    given = len(request.initial_states)
    if given not in (0, count):
        raise InvalidRequestError(f"{given} given, none or {count} expected: one a sequence", "initial_states")
    states: list[State | None] = [None] * count
    for index, snapshot in enumerate(request.initial_states):
        if snapshot.format:
            states[index] = decode_snapshot(snapshot, spec, f"initial_states[{index}]")
    return Batch(model, values, offsets, states, request.return_final_states)


def decode_chunk(chunk: pb.Chunk, spec: ModelSpec, limits: Limits) -> Float32Array:
    """Checks a chunk and views its values, [steps, input_size].

    Raises:
        InvalidRequestError: its values are wrong or over a limit.
    """
    raw = chunk.values
    width = spec.input_size * _WIRE.itemsize
    steps, rest = divmod(len(raw), width)
    if rest or not 1 <= steps <= limits.max_steps:
        problem = (
            f"{len(raw)} bytes, 1 to {limits.max_steps} timesteps of {width} bytes "
            f"({spec.input_size} float32 features) expected"
        )
        raise InvalidRequestError(problem, "chunk.values")
    values = _matrix(raw, spec.input_size)
    where = _first_not_finite(values)
    if where:
        raise InvalidRequestError(f"step {where[0]} of the chunk, feature {where[1]} is not finite", "chunk.values")
    return values


def decode_snapshot(snapshot: pb.Snapshot, spec: ModelSpec, field: str) -> State:
    """Checks a snapshot for the model `spec` and reads its state.

    Args:
        snapshot: As a caller sent it.
        spec: The model that is to go on from it.
        field: Where it stands in the request.

    Raises:
        SequenceStateError: it is of another model, version or architecture.
        InvalidRequestError: it is not a snapshot that this server can have given.
    """
    if snapshot.format != SNAPSHOT_FORMAT:
        raise InvalidRequestError(f"{snapshot.format}, {SNAPSHOT_FORMAT} expected", f"{field}.format")
    if snapshot.step > MAX_STEP:
        raise InvalidRequestError(f"{snapshot.step}, at most {MAX_STEP}", f"{field}.step")
    theirs = f"{snapshot.model}/{snapshot.version} ({snapshot.architecture})"
    ours = f"{spec.key} ({spec.architecture})"
    if theirs != ours:
        raise SequenceStateError(f"the snapshot is of {theirs}, the request is for {ours}", field)
    shapes = spec.state_shapes
    if len(snapshot.state) != len(shapes):
        raise InvalidRequestError(f"{len(snapshot.state)} state tensors, {len(shapes)} expected", f"{field}.state")
    state = []
    for index, (raw, shape) in enumerate(zip(snapshot.state, shapes, strict=True)):
        expected = shape[0] * shape[1] * _WIRE.itemsize
        where = f"{field}.state[{index}]"
        if len(raw) != expected:
            raise InvalidRequestError(f"{len(raw)} bytes, {expected} expected: float32 {list(shape)}", where)
        array = _matrix(raw, shape[1])
        if _first_not_finite(array):
            raise InvalidRequestError("holds a value that is not finite", where)
        state.append(array)
    return tuple(state)


def encode_snapshot(spec: ModelSpec, step: int, state: State | None) -> pb.Snapshot:
    """The snapshot of a sequence that has consumed `step` timesteps; no state is the zero state."""
    if state is None:
        state = tuple(np.zeros(shape, np.float32) for shape in spec.state_shapes)
    return pb.Snapshot(
        format=SNAPSHOT_FORMAT,
        model=spec.key.name,
        version=spec.key.version,
        architecture=spec.architecture,
        step=step,
        state=[encode(array) for array in state],
    )


def encode_batch(batch: Batch, request: pb.ClassifyRequest) -> pb.ClassifyResponse:
    """The answer to a request whose work is done."""
    spec = batch.model.spec
    probabilities, indices = classify(batch.logits)
    response = pb.ClassifyResponse(
        model=spec.key.name,
        version=spec.key.version,
        logits=encode(batch.logits),
        probabilities=encode(probabilities),
        label_indices=indices.tolist(),
        labels=[spec.class_labels[index] for index in indices],
    )
    if batch.keeps_states:
        begun = request.initial_states or [pb.Snapshot()] * batch.size
        steps = np.diff(batch.offsets).tolist()
        response.final_states.extend(
            encode_snapshot(spec, before.step + count, state)
            for before, count, state in zip(begun, steps, batch.final_states, strict=True)
        )
    return response


def classify(logits: Float32Array) -> tuple[Float32Array, NDArray[np.intp]]:
    """Turns logits [n, output_size] into probabilities [n, classes] and the index of each row's most probable class.

    Softmax over several logits; the sigmoid of a single one, which is class 1's. Computed in float64, so that the
    rounding to float32 hides how numpy groups the work.
    """
    wide = logits.astype(np.float64)
    if logits.shape[1] == 1:
        # Softmax of (0, z) is (1 - sigmoid(z), sigmoid(z)).
        wide = np.concatenate([np.zeros_like(wide), wide], axis=1)
    exponentials = np.exp(wide - wide.max(axis=1, keepdims=True))
    probabilities = exponentials / exponentials.sum(axis=1, keepdims=True)
    return probabilities.astype(np.float32), wide.argmax(axis=1)


def encode(array: Float32Array) -> bytes:
    """Little-endian float32, row-major."""
    return array.astype(_WIRE, copy=False).tobytes()


def _matrix(raw: bytes, width: int) -> Float32Array:
    return np.frombuffer(raw, _WIRE).reshape(-1, width).astype(np.float32, copy=False)


def _first_not_finite(values: Float32Array) -> tuple[int, int] | None:
    finite = np.isfinite(values)
    if finite.all():
        return None
    row, column = np.argwhere(~finite)[0]
    return int(row), int(column)
