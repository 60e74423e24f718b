"""The data plane below both APIs: finds models, checks values, gives the engine its jobs."""

import math
import time
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from unroll_engine.arrays import FLOAT32, first_not_finite, matrix
from unroll_engine.async_engine import AsyncEngine
from unroll_engine.errors import InvalidRequestError, ModelNotFoundError, SequenceStateError
from unroll_engine.jobs import BatchJob
from unroll_engine.models.loader import Model
from unroll_engine.models.spec import Float32Array, ModelSpec, State
from unroll_proto.v1.unroll_pb2 import Snapshot
from unroll_server import caller
from unroll_server.config import Limits
from unroll_server.middleware import CallContext
from unroll_server.repository.catalog import Catalog
from unroll_server.repository.version import LoadedVersion
from unroll_server.sessions.service import Sessions

MAX_ANSWER_BYTES = 2**28
"""Most bytes of numbers in one answer to a batch; the message is less than eight times as large."""


class DataPlane(NamedTuple):
    """The parts of the server that answer requests.

    Attributes:
        catalog: Finds the models.
        engine: Runs them.
        sessions: Advances sequences whose state the server keeps.
        limits: Limits of one call.
    """

    catalog: Catalog
    engine: AsyncEngine
    sessions: Sessions
    limits: Limits


def resolve_model(
    catalog: Catalog, snapshot: Snapshot, name: str, version: int, field: str, model_field: str = "model"
) -> LoadedVersion:
    """Finds the model that a request names, or that its snapshot names if the request does not.

    Args:
        catalog: The models.
        snapshot: The snapshot to resume from.
        name: Name of the model in the request; empty for none.
        version: Version in the request; 0 for none.
        field: Field of the snapshot in the request.
        model_field: Field of the model's name in the request.

    Raises:
        ModelNotFoundError: the model that the request names is not served.
        SequenceStateError: the model that the snapshot names is not served.
    """
    wanted = name or snapshot.model, version or snapshot.version
    try:
        return catalog.find(*wanted, model_field, resumes=snapshot.bundle)
    except ModelNotFoundError as error:
        if version or (name and error.field == model_field):
            raise
        theirs = f"{snapshot.model}/{snapshot.version} ({snapshot.architecture})"
        raise SequenceStateError(f"the snapshot is of {theirs}: {error.description}", field) from None


def decode_chunk(raw: bytes, spec: ModelSpec, limits: Limits, field: str, least: int = 1) -> Float32Array:
    """Checks the values of a chunk and returns a view of them, [steps, input_size].

    Args:
        raw: The caller's float32 values.
        spec: The model.
        limits: Limits of one call.
        field: Field of the values in the request.
        least: Least number of timesteps.

    Raises:
        InvalidRequestError: the size is wrong or over a limit, or a value is not finite.
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
    if where := first_not_finite(values):
        raise InvalidRequestError(f"step {where[0]} of the chunk, feature {where[1]} is not finite", field)
    return values


def new_batch(
    model: Model,
    values: Float32Array,
    offsets: NDArray[np.int64],
    initial_state: State | None,
    keeps_states: bool,
    deadline: float,
) -> BatchJob:
    """Makes a job of the current call; see jobs.BatchJob."""
    call = caller.current.get()
    call.steps += len(values)
    return BatchJob(
        model, values, offsets, initial_state, keeps_states, deadline, call.identity, call.trace, call.waited
    )


def check_finite(values: Float32Array, offsets: NDArray[np.int64], field: str) -> None:
    """Checks the values of a batch.

    Args:
        values: [total_steps, input_size], the sequences concatenated.
        offsets: int64 [sequences + 1], first row of each sequence, and the end.
        field: The values' field in the request.

    Raises:
        InvalidRequestError: a value is NaN or infinite.
    """
    # A search for a zero byte: for a short sequence numpy's own reduction takes three times as long.
    if b"\0" not in np.isfinite(values).tobytes():
        return
    step, feature = first_not_finite(values) or (0, 0)
    index = int(np.searchsorted(offsets, step, side="right")) - 1
    place = f"sequence {index}, step {step - offsets[index]}, feature {feature}"
    raise InvalidRequestError(f"{place} is not finite", field)


def check_answer(spec: ModelSpec, sequences: int, keeps_states: bool, field: str) -> None:
    """Checks that the answer to a batch fits into a message.

    Args:
        spec: The model.
        sequences: Number of sequences.
        keeps_states: True if the states after the last steps are wanted.
        field: The field of the request that gives the number of sequences.

    Raises:
        InvalidRequestError: the answer would be too large.
    """
    state = sum(tensor.nbytes for tensor in spec.states) if keeps_states else 0
    size = sequences * (2 * spec.output_size * FLOAT32.itemsize + state)
    if size > MAX_ANSWER_BYTES:
        problem = f"{sequences} sequences make an answer of {size} bytes, at most {MAX_ANSWER_BYTES} allowed"
        raise InvalidRequestError(problem, field)


def deadline_of(context: CallContext) -> float:
    """Returns the deadline of a call on the engine's clock, in seconds; infinite if it has none."""
    remaining = context.time_remaining()
    return math.inf if remaining is None else time.monotonic() + remaining
