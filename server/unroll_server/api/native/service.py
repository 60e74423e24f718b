"""unroll.v1.UnrollService."""

import math
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unroll_engine.arrays import FLOAT32
from unroll_engine.errors import InvalidRequestError
from unroll_engine.jobs import BatchJob, span
from unroll_engine.models.loader import Model
from unroll_engine.models.spec import State
from unroll_engine.readout import check_has_state, no_classes
from unroll_engine.snapshots import decode_snapshot, encode_snapshot
from unroll_proto.v1 import unroll_pb2 as pb
from unroll_proto.v1.unroll_pb2_grpc import UnrollServiceServicer
from unroll_server.api.data_plane import (
    DataPlane,
    check_answer,
    check_finite,
    deadline_of,
    new_batch,
    resolve_model,
)
from unroll_server.api.native.advance import advance
from unroll_server.api.native.description import describe
from unroll_server.api.native.joiner import ChunkJoiner
from unroll_server.api.native.stream import Stream
from unroll_server.api.streams import OpenStreams
from unroll_server.config import Limits
from unroll_server.identity.quotas import Quotas


class UnrollService(UnrollServiceServicer):
    """The service.

    Args:
        plane: Answers the requests.
        quotas: Bounds the open sequences of each identity.
    """

    def __init__(self, plane: DataPlane, quotas: Quotas) -> None:
        self._plane = plane
        self._quotas = quotas
        self._streams = OpenStreams()
        self._joiner = ChunkJoiner(plane.engine, plane.limits.max_steps)

    def drain(self, half_close_timeout: float) -> None:
        """Drains every stream: answers the requests read, then returns snapshots of open sequences; see OpenStreams."""
        self._streams.drain(half_close_timeout)

    async def Classify(self, request: pb.ClassifyRequest, context: Any) -> pb.ClassifyResponse:
        """See unroll.proto."""
        version = None
        for index, snapshot in enumerate(request.initial_states):
            # All are of one model, or decoding refuses one. A snapshot without a format is of no model.
            if snapshot.format:
                field = f"initial_states[{index}]"
                version = resolve_model(self._plane.catalog, snapshot, request.model, request.version, field)
                break
        if version is None:
            version = self._plane.catalog.find(request.model, request.version)
        batch = decode_batch(request, version.model, self._plane.limits, deadline_of(context))
        await self._plane.engine.run(batch)
        return encode_batch(batch, request)

    # grpc.aio accepts this form, which writes; the generated stubs know only the form that yields.
    async def Unroll(  # type: ignore[override]
        self, request_iterator: AsyncIterator[pb.UnrollRequest], context: Any
    ) -> None:
        """See unroll.proto; the answers are written to the context."""
        stream = Stream(self._plane, self._quotas, self._joiner)
        await self._streams.run(stream, request_iterator, context.write)

    async def Advance(self, request: pb.AdvanceRequest, context: Any) -> pb.AdvanceResponse:
        """See unroll.proto."""
        return await advance(request, self._plane, context)

    async def ListModels(self, request: pb.ListModelsRequest, context: Any) -> pb.ListModelsResponse:
        """See unroll.proto."""
        models = [describe(model, self._plane.limits) for model in self._plane.catalog.models]
        return pb.ListModelsResponse(models=models)

    async def GetModel(self, request: pb.GetModelRequest, context: Any) -> pb.GetModelResponse:
        """See unroll.proto."""
        # A client may ask for its sequence's version, which may be draining by now.
        version = self._plane.catalog.find(request.model, request.version, resumes=b"")
        return pb.GetModelResponse(model=describe(version.model, self._plane.limits))


def decode_batch(request: pb.ClassifyRequest, model: Model, limits: Limits, deadline: float = math.inf) -> BatchJob:
    """Checks a request and makes a job of it, without copying its values.

    Args:
        request: The caller's request.
        model: The model to run it on.
        limits: Limits of one call.
        deadline: On the engine's clock, in seconds.

    Raises:
        InvalidRequestError: a field is wrong or over a limit.
        SequenceStateError: an initial state is of another model.
    """
    spec = model.spec
    if not spec.class_labels:
        raise no_classes(spec)
    if request.return_final_states:
        check_has_state(spec, "return_final_states")
    # Read once: each access to a repeated field creates an object.
    given_lengths = request.lengths
    count = len(given_lengths)
    if not 1 <= count <= limits.max_sequences:
        raise InvalidRequestError(f"{count} sequences, 1 to {limits.max_sequences} allowed", "lengths")
    check_answer(spec, count, request.return_final_states, "lengths")
    offsets: NDArray[np.int64]
    if count == 1:
        # The common case: for one number numpy's overhead exceeds Python's time.
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
    raw = request.values
    expected = total * spec.input_size * FLOAT32.itemsize
    if len(raw) != expected:
        problem = f"{len(raw)} bytes, {expected} expected: {total} timesteps of {spec.input_size} float32 features"
        raise InvalidRequestError(problem, "values")
    values = np.frombuffer(raw, FLOAT32).reshape(-1, spec.input_size).astype(np.float32, copy=False)
    check_finite(values, offsets, "values")
    given_states = request.initial_states
    if len(given_states) not in (0, count):
        problem = f"{len(given_states)} given, none or {count} expected: one per sequence"
        raise InvalidRequestError(problem, "initial_states")
    initial: State | None = None
    for index, snapshot in enumerate(given_states):
        if snapshot.format:
            initial = initial or spec.initial_state(count)
            state = decode_snapshot(snapshot, spec, f"initial_states[{index}]")
            for array, value in zip(initial, state, strict=True):
                array[:, index] = value
    return new_batch(model, values, offsets, initial, request.return_final_states, deadline)


def encode_batch(batch: BatchJob, request: pb.ClassifyRequest) -> pb.ClassifyResponse:
    """Returns the answer to a request whose job is done."""
    spec = batch.model.spec
    indices = batch.labels.tolist()
    response = pb.ClassifyResponse(
        model=spec.key.name,
        version=spec.key.version,
        logits=batch.logits.astype(FLOAT32, copy=False).tobytes(),
        probabilities=batch.probabilities.astype(FLOAT32, copy=False).tobytes(),
        label_indices=indices,
        labels=map(spec.class_labels.__getitem__, indices),
    )
    if batch.final_state is not None:
        # A snapshot without a format stands for the zero state, whatever its other fields.
        begun = [before.step if before.format else 0 for before in request.initial_states] or [0] * batch.size
        steps = np.diff(batch.offsets).tolist()
        response.final_states.extend(
            encode_snapshot(spec, before + count, tuple(array[:, index] for array in batch.final_state))
            for index, (before, count) in enumerate(zip(begun, steps, strict=True))
        )
    return response
