"""Sessions: requests and answers of a sequence whose state the server keeps."""

from __future__ import annotations

from collections.abc import Awaitable
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray

from unroll_client._arrays import FLOAT32, check_number, cut, join
from unroll_client._calls import Rpc
from unroll_client._types import Limits, Tensor, named_outputs
from unroll_proto.snapshot import Snapshot
from unroll_proto.v1 import unroll_pb2 as pb

SESSION_HEADER = "x-session-id"
"""Metadata by which a balancer can send every call of a session to the same server: the id, percent-encoded."""

T = TypeVar("T")

# Bytes of an Advance message besides values and names: `first_step`, flags and framing.
_ENVELOPE_BYTES = 64


@dataclass(frozen=True, slots=True, eq=False)
class SessionSteps:
    """Results of the timesteps `first_step` to `first_step + count - 1` of a session.

    Attributes:
        model: Name of the model.
        version: Model version that the session stays on until it ends.
        first_step: Number of the first timestep.
        count: Timesteps that were computed.
        states: float32 [count, hidden_size], the last layer's hidden state after each; None if not asked for.
        logits: float32 [count, output_size]; None if not asked for. Of a step model, its outputs concatenated.
        label: Most probable class after the last step; empty if there was no step, or the model has no classes.
        label_index: Its index in the model's `class_labels`.
        probabilities: float32 [classes], after the last step; [0] if there was no step.
        step: Timesteps that the session has consumed: the `first_step` of the next chunk.
        snapshot: The state after these steps; None if not asked for.
    """

    model: str
    version: int
    first_step: int
    count: int
    states: NDArray[np.float32] | None = field(repr=False)
    logits: NDArray[np.float32] | None = field(repr=False)
    label: str
    label_index: int
    probabilities: NDArray[np.float32]
    step: int
    snapshot: Snapshot | None = field(repr=False)
    _outputs: tuple[Tensor, ...] = field(default=(), repr=False)

    def __len__(self) -> int:
        return self.count

    @property
    def outputs(self) -> dict[str, NDArray[np.float32]]:
        """The outputs by name, float32 [count, *shape] each: `logits`, or those of a step model."""
        if self.logits is None:
            return {}
        named = self._outputs and self.count
        return named_outputs(self.logits, self._outputs) if named else {"logits": self.logits}


def of_session(rpc: Rpc[T], session_id: str) -> Rpc[T]:
    """Returns an RPC that names its session in the metadata, for balancers."""

    def call(request: object, *, metadata: tuple[tuple[str, str], ...], **options: Any) -> Awaitable[T]:
        return rpc(request, metadata=(*metadata, (SESSION_HEADER, quote(session_id, safe=""))), **options)

    return call


def advance_request(
    session_id: str,
    model: str,
    version: int,
    start: bool,
    end: bool,
    first_step: int | None,
    snapshot: Snapshot | None,
    bound: bool,
) -> pb.AdvanceRequest:
    """Makes the request for the next steps of a session, without their values; see `AsyncClient.advance`.

    Raises:
        InvalidArgument: the wire can't carry a number.
    """
    check_number("version", version)
    if first_step is not None:
        check_number("first_step", first_step, bits=64)
    return pb.AdvanceRequest(
        session_id=session_id,
        model=model,
        version=version,
        start=start,
        end=end,
        first_step=first_step,
        initial_state=snapshot.to_proto() if snapshot else None,
        bound=bound,
    )


def pieces(request: pb.AdvanceRequest, values: NDArray[np.float32] | None, limits: Limits | None) -> list[bytes]:
    """Splits a chunk into the values of one or more requests within the server's limits; None if there is no chunk."""
    if values is None or limits is None:
        return [b"" if values is None else values.tobytes()]
    envelope = request.ByteSize() + _ENVELOPE_BYTES
    return [part.tobytes() for part in cut(values, limits.max_steps, limits.max_message_bytes, envelope)]


def piece_request(
    request: pb.AdvanceRequest, values: bytes, before: SessionSteps | None, *, last: bool
) -> pb.AdvanceRequest:
    """Makes the request for one piece of a chunk.

    Args:
        request: Request for the whole chunk, without values.
        values: Values of the piece.
        before: Answer to the previous piece; None for the first.
        last: True for the last piece.
    """
    piece = pb.AdvanceRequest()
    piece.CopyFrom(request)
    piece.values = values
    if before is not None:
        # The number of the first step is known from the previous answer, and makes the request repeatable.
        piece.first_step = before.step
        if piece.start:
            piece.start, piece.bound, piece.model, piece.version = False, False, "", 0
            piece.ClearField("initial_state")
    if not last:
        piece.end = piece.return_snapshot = False
    return piece


def joined_steps(parts: list[SessionSteps]) -> SessionSteps:
    """Joins the answers to consecutive pieces."""
    if len(parts) == 1:
        return parts[0]
    return replace(
        parts[-1],
        first_step=parts[0].first_step,
        count=sum(part.count for part in parts),
        states=_joined([part.states for part in parts]),
        logits=_joined([part.logits for part in parts]),
    )


def _joined(arrays: list[NDArray[np.float32] | None]) -> NDArray[np.float32] | None:
    given = [array for array in arrays if array is not None]
    return join(given) if given else None


def session_steps(answer: pb.AdvanceResponse, request: pb.AdvanceRequest) -> SessionSteps:
    """Decodes an answer of the server."""
    return SessionSteps(
        model=answer.model,
        version=answer.version,
        first_step=answer.first_step,
        count=answer.count,
        states=_rows(answer.states, answer.count) if request.return_states else None,
        logits=_rows(answer.logits, answer.count) if request.return_logits or answer.logits else None,
        label=answer.label,
        label_index=answer.label_index,
        probabilities=np.frombuffer(answer.probabilities, FLOAT32).astype(np.float32),
        step=answer.step,
        snapshot=Snapshot.from_proto(answer.snapshot) if request.return_snapshot else None,
    )


def _rows(data: bytes, rows: int) -> NDArray[np.float32]:
    columns = len(data) // (rows * FLOAT32.itemsize) if rows else 0
    return np.frombuffer(data, FLOAT32).reshape(rows, columns).astype(np.float32)
