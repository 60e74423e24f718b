"""A chunk of a session: its place in the sequence, and the session after it. Independent of store and engine."""

import asyncio
import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass

from unroll_engine.arrays import to_bytes
from unroll_engine.errors import InvalidRequestError, SequenceStateError
from unroll_engine.models.loader import Model
from unroll_engine.models.spec import Float32Array, ModelSpec, State
from unroll_engine.snapshots import decode_snapshot, encode_snapshot
from unroll_proto.v1.session_pb2 import AppliedChunk, Session
from unroll_proto.v1.unroll_pb2 import Snapshot
from unroll_server.errors import SessionNotFoundError, SessionTakenError
from unroll_server.sessions.store import FORMAT


@dataclass(frozen=True, slots=True)
class Advance:
    """The next steps of a session.

    Attributes:
        owner: Identity that owns the session; the same id of another owner is another session.
        session_id: Id of the session, 1 to 128 bytes of UTF-8.
        model: With start, the name of the model, empty for the only one. Later empty, or that of the session.
        version: With start, the number of the version, 0 for the newest. Later 0, or that of the session.
        start: True to start the session, over again if there is one.
        end: True to end the session after these steps.
        first_step: Number of the first step; None for the session's next one.
        values: float32 [steps, input_size], finite, or a function that decodes them for the session's model. Zero steps
            only with start or end.
        deadline: Seconds on the engine's clock (time.monotonic).
        initial_state: With start, the state before the first step, float32 [num_layers, hidden_size] each; None for
            zeros.
        initial_step: Steps consumed before `initial_state`.
        initial_bundle: Bundle that computed `initial_state`, see ModelSpec; empty if unknown.
        keep_states: True to return the states after all steps.
        connection: With start, done when the connection closes with which the session ends; None to outlive it.
    """

    owner: str
    session_id: str
    model: str
    version: int
    start: bool
    end: bool
    first_step: int | None
    values: Float32Array | Callable[[ModelSpec], Float32Array]
    deadline: float = math.inf
    initial_state: State | None = None
    initial_step: int = 0
    initial_bundle: bytes = b""
    keep_states: bool = True
    connection: asyncio.Future[None] | None = None


@dataclass(frozen=True, slots=True)
class Advanced:
    """Results of the steps.

    Attributes:
        model: Model that the session stays on.
        first_step: Number of the first step.
        logits: float32 [steps, output_size].
        states: float32 [steps, hidden_size] of the last layer; [0, hidden_size] without `keep_states`.
        state: State after the last step, float32 [num_layers, hidden_size] each.
    """

    model: Model
    first_step: int
    logits: Float32Array
    states: Float32Array
    state: State

    @property
    def step(self) -> int:
        """Timesteps consumed, the number of the next one."""
        return self.first_step + len(self.logits)


def new_session(request: Advance, spec: ModelSpec) -> Session:
    """Returns the session that a request starts."""
    snapshot = encode_snapshot(spec, request.initial_step, request.initial_state)
    return Session(format=FORMAT, owner=request.owner, session_id=request.session_id, snapshot=snapshot)


def no_session(request: Advance) -> SessionNotFoundError:
    """Returns the error for a session that does not exist or has ended."""
    return SessionNotFoundError(f"no session {request.session_id!r}", "session_id")


def check_values(request: Advance, values: Float32Array, spec: ModelSpec) -> None:
    """Checks the values of a chunk.

    Raises:
        InvalidRequestError: they are not [steps, input_size], or are empty without `start` or `end`.
    """
    if values.ndim != 2 or values.shape[1] != spec.input_size:
        problem = f"shape {list(values.shape)}, {spec.key} expects [steps, {spec.input_size}]"
        raise InvalidRequestError(problem, "values")
    if not len(values) and not (request.start or request.end):
        raise InvalidRequestError("no timesteps; allowed only with start or end", "values")


def locate(request: Advance, session: Session, values: Float32Array, spec: ModelSpec) -> tuple[int, State, bool]:
    """Finds the place of a chunk in its session.

    Returns:
        Number of its first step, the state before it, and True if the chunk was applied before.

    Raises:
        SequenceStateError: the chunk is ahead of the session.
        SessionNotFoundError: the session has ended.
        SessionTakenError: another writer has advanced the session.
    """
    at, first, last = session.snapshot.step, request.first_step, session.last
    if request.start:
        if first not in (None, at):
            raise SequenceStateError(f"{first}, the session starts at step {at}", "first_step")
        return at, _state_of(session.snapshot, spec), False
    if first is not None and request.end == session.ended:
        if session.HasField("last") and _chunk(first, values) == (last.first_step, last.count, last.digest):
            before = Snapshot.FromString(session.snapshot.SerializeToString())
            before.step = first
            before.state[:] = last.state
            return first, _state_of(before, spec), True
        if request.end and not len(values) and first == at:
            return at, _state_of(session.snapshot, spec), True
    if session.ended:
        raise no_session(request)
    if first is not None and first > at:
        raise SequenceStateError(f"{first}, the session continues at step {at}", "first_step")
    if first is not None and first < at:
        problem = f"{first}, another writer has advanced the session to step {at}"
        raise SessionTakenError(problem, "first_step")
    return at, _state_of(session.snapshot, spec), False


def successor(request: Advance, session: Session, values: Float32Array, answer: Advanced) -> Session:
    """Returns the session after the chunk, as it is stored."""
    after = Session(
        format=FORMAT,
        owner=session.owner,
        session_id=session.session_id,
        snapshot=encode_snapshot(answer.model.spec, answer.step, answer.state),
        ended=request.end,
        bound=b"" if request.end else session.bound,
    )
    if len(values):
        first_step, count, digest = _chunk(answer.first_step, values)
        before = session.snapshot.state
        after.last.CopyFrom(AppliedChunk(first_step=first_step, count=count, digest=digest, state=before))
    return after


def _chunk(first_step: int, values: Float32Array) -> tuple[int, int, bytes]:
    return first_step, len(values), hashlib.blake2b(to_bytes(values), digest_size=16).digest()


def _state_of(snapshot: Snapshot, spec: ModelSpec) -> State:
    try:
        return decode_snapshot(snapshot, spec, "session_id")
    except InvalidRequestError as error:
        # Not the caller's fault: a model of other sizes was served by this name.
        raise SequenceStateError(f"the session does not fit {spec.key}: {error}", "session_id") from None
