"""A chunk of a session: where it belongs, and what is kept of the session after it. No store, no engine."""

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
        owner: Whose session it is; another owner's id is another session.
        session_id: Names it, 1 to 128 bytes of UTF-8.
        model: Where it starts, the model; empty means the only one. Later empty, or the session's own.
        version: Where it starts, the version, 0 the newest. Later 0, or the session's own.
        start: Begins it, anew where there is one.
        end: Ends it after these steps.
        first_step: The number of the first step; None: goes on wherever the session is.
        values: [steps, input_size], finite, or what gives them once the model is known. No step only with start or end.
        deadline: On the engine's clock (time.monotonic), in seconds.
        initial_state: Where it starts, [num_layers, hidden_size] each; None is the zero state.
        initial_step: Steps consumed before `initial_state`.
        initial_bundle: What computed it, as in ModelSpec, where that is known.
        keep_states: Whether the states after all steps are wanted.
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


@dataclass(frozen=True, slots=True)
class Advanced:
    """What the steps gave.

    Attributes:
        model: The version that the session stays on.
        first_step: Number of the first step.
        logits: [steps, output_size].
        states: [steps, hidden_size] of the last layer; [0, hidden_size] where they were not wanted.
        state: After the last step, [num_layers, hidden_size] each.
    """

    model: Model
    first_step: int
    logits: Float32Array
    states: Float32Array
    state: State

    @property
    def step(self) -> int:
        """Timesteps consumed: the number of the next one."""
        return self.first_step + len(self.logits)


def new_session(request: Advance, spec: ModelSpec) -> Session:
    """A session that starts."""
    snapshot = encode_snapshot(spec, request.initial_step, request.initial_state)
    return Session(format=FORMAT, owner=request.owner, session_id=request.session_id, snapshot=snapshot)


def no_session(request: Advance) -> SessionNotFoundError:
    """Error for a session that does not exist or has ended."""
    return SessionNotFoundError(f"no session {request.session_id!r}", "session_id")


def check_values(request: Advance, values: Float32Array, spec: ModelSpec) -> None:
    """Checks the values of a chunk.

    Raises:
        InvalidRequestError: they are not [steps, input_size], or none where there must be some.
    """
    if values.ndim != 2 or values.shape[1] != spec.input_size:
        problem = f"shape {list(values.shape)}, [steps, {spec.input_size}] expected by {spec.key}"
        raise InvalidRequestError(problem, "values")
    if not len(values) and not (request.start or request.end):
        raise InvalidRequestError("no timesteps, which only the start or the end of a session may have", "values")


def place(request: Advance, session: Session, values: Float32Array, spec: ModelSpec) -> tuple[int, State, bool]:
    """Where the chunk belongs: the number of its first step, the state before it, and whether it was applied before.

    Raises:
        SequenceStateError: the session has not come so far.
        SessionNotFoundError: it has ended.
        SessionTakenError: another writer has moved it on.
    """
    at, first, last = session.snapshot.step, request.first_step, session.last
    if request.start:
        if first not in (None, at):
            raise SequenceStateError(f"{first}, the session begins at step {at}", "first_step")
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
        raise SequenceStateError(f"{first}, the session goes on at step {at}", "first_step")
    if first is not None and first < at:
        problem = f"another writer has moved the session on: it goes on at step {at}, not {first}"
        raise SessionTakenError(problem, "first_step")
    return at, _state_of(session.snapshot, spec), False


def following(request: Advance, session: Session, values: Float32Array, answer: Advanced) -> Session:
    """What is kept of the session after the chunk."""
    following = Session(
        format=FORMAT,
        owner=session.owner,
        session_id=session.session_id,
        snapshot=encode_snapshot(answer.model.spec, answer.step, answer.state),
        ended=request.end,
    )
    if len(values):
        first_step, count, digest = _chunk(answer.first_step, values)
        before = session.snapshot.state
        following.last.CopyFrom(AppliedChunk(first_step=first_step, count=count, digest=digest, state=before))
    return following


def _chunk(first_step: int, values: Float32Array) -> tuple[int, int, bytes]:
    return first_step, len(values), hashlib.blake2b(to_bytes(values), digest_size=16).digest()


def _state_of(snapshot: Snapshot, spec: ModelSpec) -> State:
    try:
        return decode_snapshot(snapshot, spec, "session_id")
    except InvalidRequestError as error:
        # What is kept is not the caller's: a model of other sizes was served under this name.
        raise SequenceStateError(f"the session does not fit {spec.key}: {error}", "session_id") from None
