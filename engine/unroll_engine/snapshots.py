"""Snapshots of sequences: conversion between the message `unroll.v1.Snapshot` and the state of a model."""

from unroll_engine.arrays import first_not_finite, matrix, to_bytes
from unroll_engine.errors import InvalidRequestError, SequenceStateError
from unroll_engine.models.spec import ModelSpec, State
from unroll_proto.snapshot import FORMAT
from unroll_proto.v1 import unroll_pb2 as pb

MAX_STEP = 2**62
"""Largest step number of a snapshot; leaves room to continue, since step numbers are uint64 on the wire."""


def decode_snapshot(snapshot: pb.Snapshot, spec: ModelSpec, field: str) -> State:
    """Checks a snapshot for the model `spec` and reads its state.

    Args:
        snapshot: The caller's message.
        spec: The model that is to resume from it.
        field: Its field in the request.

    Raises:
        SequenceStateError: it is of another model, version or architecture, or of other content of the version.
        InvalidRequestError: its state does not fit the model.
    """
    if snapshot.format != FORMAT:
        raise InvalidRequestError(f"{snapshot.format}, {FORMAT} expected", f"{field}.format")
    if snapshot.step > MAX_STEP:
        raise InvalidRequestError(f"{snapshot.step}, at most {MAX_STEP}", f"{field}.step")
    theirs = f"{snapshot.model}/{snapshot.version} ({snapshot.architecture})"
    ours = f"{spec.key} ({spec.architecture})"
    if theirs != ours:
        raise SequenceStateError(f"the snapshot is of {theirs}, the request is for {ours}", field)
    check_bundle(snapshot, spec, "snapshot", field)
    tensors = spec.states
    if len(snapshot.state) != len(tensors):
        names = ", ".join(tensor.name for tensor in tensors)
        problem = f"{len(snapshot.state)} state tensors, {len(tensors)} expected: {names}"
        raise InvalidRequestError(problem, f"{field}.state")
    state = []
    for index, (raw, tensor) in enumerate(zip(snapshot.state, tensors, strict=True)):
        where = f"{field}.state[{index}]"
        if len(raw) != tensor.nbytes:
            problem = f"{len(raw)} bytes, {tensor.nbytes} expected: {tensor.dtype} {list(tensor.shape)}"
            raise InvalidRequestError(problem, where)
        array = matrix(raw, tensor.shape[1], tensor.dtype)
        if first_not_finite(array):
            raise InvalidRequestError("holds a value that is not finite", where)
        state.append(array)
    return tuple(state)


def check_bundle(snapshot: pb.Snapshot, spec: ModelSpec, what: str, field: str) -> None:
    """Checks that a snapshot is of the same content of the version; errors call it `what`.

    Raises:
        SequenceStateError: it is of other content of the version.
    """
    if snapshot.bundle and snapshot.bundle != spec.bundle:
        theirs, ours = snapshot.bundle.hex(), spec.bundle.hex()
        problem = f"the {what} is of {spec.key} with bundle {theirs}, served is {spec.key} with bundle {ours}"
        raise SequenceStateError(problem, field)


def encode_snapshot(spec: ModelSpec, step: int, state: State | None) -> pb.Snapshot:
    """Makes the snapshot of a sequence after `step` timesteps; a state of None is the initial state."""
    if state is None:
        state = tuple([array[:, 0] for array in spec.initial_state(1)])
    return pb.Snapshot(
        format=FORMAT,
        model=spec.key.name,
        version=spec.key.version,
        architecture=spec.architecture,
        step=step,
        state=[to_bytes(array) for array in state],
        bundle=spec.bundle,
    )
