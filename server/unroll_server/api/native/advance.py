"""unroll.v1.UnrollService.Advance: the next steps of a session."""

import asyncio
from typing import Any

from unroll_engine.arrays import to_bytes
from unroll_engine.errors import InvalidRequestError
from unroll_engine.models.spec import Float32Array, ModelSpec
from unroll_engine.readout import classify
from unroll_engine.snapshots import decode_snapshot, encode_snapshot
from unroll_proto.v1 import unroll_pb2 as pb
from unroll_server import caller
from unroll_server.api.data_plane import DataPlane, deadline_of, decode_chunk, resolve_model
from unroll_server.errors import NotOfferedError
from unroll_server.sessions.chunk import Advance, Advanced


async def advance(request: pb.AdvanceRequest, plane: DataPlane, context: Any) -> pb.AdvanceResponse:
    """Answers a request; see unroll.proto.

    Args:
        request: The caller's request.
        plane: The data plane.
        context: Context of the call.
    """
    # The store may have to be waited for. Now, since later a version would have been picked that may drain meanwhile.
    await caller.in_task()

    def values(spec: ModelSpec) -> Float32Array:
        return decode_chunk(request.values, spec, plane.limits, "values", least=0)

    name, number, state = request.model, request.version, None
    if request.HasField("initial_state"):
        if not request.start:
            raise InvalidRequestError("only a session that starts can have one", "initial_state")
        snapshot = request.initial_state
        spec = resolve_model(plane.catalog, snapshot, name, number, "initial_state").spec
        state = decode_snapshot(snapshot, spec, "initial_state")
        name, number = spec.key
    done = await plane.sessions.advance(
        Advance(
            owner=caller.current.get().identity,
            session_id=request.session_id,
            model=name,
            version=number,
            start=request.start,
            end=request.end,
            first_step=request.first_step if request.HasField("first_step") else None,
            values=values,
            deadline=deadline_of(context),
            initial_state=state,
            initial_step=request.initial_state.step,
            initial_bundle=request.initial_state.bundle,
            keep_states=request.return_states,
            connection=_connection(request, context) if request.bound else None,
        )
    )
    return _answer(done, request)


def _connection(request: pb.AdvanceRequest, context: Any) -> asyncio.Future[None]:
    """Returns what is done when the connection closes that a session is bound to."""
    if not request.start:
        raise InvalidRequestError("only a session that starts can be bound to its connection", "bound")
    closed: asyncio.Future[None] | None = getattr(context, "connection_closed", None)
    if closed is None:
        problem = "grpcio does not tell when a connection closes; the server needs --transport native"
        raise NotOfferedError(problem, "bound")
    return closed


def _answer(done: Advanced, request: pb.AdvanceRequest) -> pb.AdvanceResponse:
    spec = done.model.spec
    response = pb.AdvanceResponse(
        model=spec.key.name,
        version=spec.key.version,
        first_step=done.first_step,
        count=len(done.logits),
        step=done.step,
    )
    if request.return_states:
        response.states = to_bytes(done.states)
    if request.return_logits or spec.step:
        response.logits = to_bytes(done.logits)
    if len(done.logits) and spec.class_labels:
        probabilities, labels = classify(done.logits[-1:], spec.step)
        response.probabilities = to_bytes(probabilities)
        response.label_index = int(labels[0])
        response.label = spec.class_labels[response.label_index]
    if request.return_snapshot:
        response.snapshot.CopyFrom(encode_snapshot(spec, done.step, done.state))
    return response
