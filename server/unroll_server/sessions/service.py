"""Sessions: a step number compared and set for each chunk, so that no two writers go on from the same state."""

import asyncio
import hashlib
import math
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import numpy as np

from unroll_proto.v1.session_pb2 import AppliedChunk, Session
from unroll_proto.v1.unroll_pb2 import Snapshot
from unroll_server import usage
from unroll_server.catalog import Catalog
from unroll_server.codec import MAX_KEY_BYTES, decode_snapshot, encode, encode_snapshot
from unroll_server.engine import Engine
from unroll_server.errors import (
    ExpiredError,
    InvalidRequestError,
    ModelNotFoundError,
    OverloadedError,
    RequestError,
    SequenceStateError,
    SessionExpiredError,
    SessionNotFoundError,
    SessionStoreError,
    SessionTakenError,
)
from unroll_server.models import Model
from unroll_server.sessions.running import compute
from unroll_server.sessions.store import FORMAT, Kept, Listed, Store
from unroll_server.types import Float32Array, ModelKey, ModelSpec, State

REASON = "SESSION_"
"""What the reasons of the errors about sessions begin with."""
RETRY_AFTER = 1.0
"""Seconds after which one who has as many sessions as they may is to try again."""
PATIENCE = 10.0
"""Seconds that a store has for one answer, where the caller's deadline leaves it as much."""


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


class Sessions:
    """Goes on with sessions whose state a store keeps.

    A chunk is computed from the state that was read, and applied where nobody else has applied one meanwhile. Two
    calls for one session at a time are two writers: whoever wants an order waits for each answer.

    Args:
        store: Keeps the sessions.
        catalog: The models.
        engine: What runs them.
        count: Told what became of each request: "started", "advanced", "repeated", "ended"; "unknown", "expired",
            "taken", "room" and "store" for the errors of these names.
        limit_of: Tells how many sessions an owner may have; None: any number.
    """

    def __init__(
        self,
        store: Store,
        catalog: Catalog,
        engine: Engine,
        count: Callable[[str], None] = lambda _: None,
        limit_of: Callable[[str], int | None] = lambda _: None,
    ) -> None:
        self.store = store
        self._catalog = catalog
        self._engine = engine
        self._count = count
        self._limit_of = limit_of

    async def advance(self, request: Advance) -> Advanced:
        """Computes and applies the next steps of a session.

        With `first_step`, the chunk that was applied last is answered again, to the same bits, and applied once. A
        call that fails or is cancelled leaves the session as it was; of one whose caller is gone while the store
        writes, nobody can tell.

        Raises:
            InvalidRequestError: the id, the number of features, or no step where there must be one.
            ModelNotFoundError: no such model or version is served.
            SequenceStateError: the session has not come so far, or is on another model or version.
            SessionNotFoundError: there is no such session.
            SessionExpiredError: it is no more.
            SessionTakenError: another writer has moved it on.
            SessionRoomError: there is no room for it.
            SessionStoreError: the store does not answer.
            OverloadedError, ExpiredError, InternalError: as the engine says.
        """
        try:
            answer, outcome = await self._advance(request)
        except RequestError as error:
            if error.reason.startswith(REASON):
                self._count(error.reason.removeprefix(REASON).lower())
            raise
        self._count(outcome)
        return answer

    async def count(self, model: ModelKey) -> int:
        """How many sessions stay on a model version.

        Raises:
            SessionStoreError: the store does not answer.
        """
        async with _patience(math.inf):
            return await self.store.count(model)

    async def list(self, limit: int = 1000) -> list[Listed]:
        """Up to `limit` sessions of all owners, those used last first.

        Raises:
            SessionStoreError: the store does not answer.
        """
        async with _patience(math.inf):
            return await self.store.listed(limit)

    async def end(self, owner: str, session_id: str) -> bool:
        """Ends a session, whatever it is doing; returns whether there was one.

        Raises:
            SessionStoreError: the store does not answer.
        """
        async with _patience(math.inf):
            return await self.store.remove(owner, session_id)

    async def close(self) -> None:
        """Closes the store."""
        await self.store.close()

    async def _advance(self, request: Advance) -> tuple[Advanced, str]:
        size = len(request.session_id.encode())
        if not 1 <= size <= MAX_KEY_BYTES:
            raise InvalidRequestError(f"{size} bytes, 1 to {MAX_KEY_BYTES} allowed", "session_id")
        kept = await self._read(request)
        if request.start:
            model = self._catalog.find(request.model, request.version, resumes=request.initial_state is not None)
            session = _new_session(request, model.spec)
            if kept is None or kept.session.ended:
                await self._check_limit(request)
        elif kept is None:
            raise SessionNotFoundError(f"no session {request.session_id!r}", "session_id")
        else:
            session = kept.session
            model = self._model_of(request, session)
        spec = model.spec
        values = request.values(spec) if callable(request.values) else request.values
        _check_values(request, values, spec)
        first_step, state, repeats = _place(request, session, values, spec)
        if len(values):
            wanted = request.keep_states
            self._catalog.hold(model)
            try:
                logits, states, after = await compute(self._engine, model, values, state, request.deadline, wanted)
            finally:
                self._catalog.release(model)
        else:
            logits, states = np.empty((0, spec.output_size), np.float32), np.empty((0, spec.hidden_size), np.float32)
            after = state
        answer = Advanced(model, first_step, logits, states, after)
        if repeats:
            return answer, "repeated"
        following = _following(request, session, values, answer)
        async with _patience(request.deadline):
            if await self.store.put(following, kept.revision if kept else None):
                return answer, "ended" if request.end else "started" if request.start else "advanced"
            # An earlier try of this very call, whose answer was lost, can have been the faster one.
            if request.start or request.first_step is not None:
                found = await self.store.get(request.owner, request.session_id)
                if found is not None and found.session == following:
                    return answer, "repeated"
        raise SessionTakenError("another writer has moved the session on meanwhile", "session_id")

    async def _read(self, request: Advance) -> Kept | None:
        async with _patience(request.deadline):
            try:
                return await self.store.get(request.owner, request.session_id)
            except SessionExpiredError:
                if request.start:
                    return None
                raise

    async def _check_limit(self, request: Advance) -> None:
        limit = self._limit_of(request.owner)
        if limit is None or request.end:
            return
        async with _patience(request.deadline):
            has = await self.store.owned(request.owner)
        # Calls of the same moment can go past it, by one each.
        if has >= limit:
            problem = f"{request.owner} has {has} sessions and may have {limit}"
            raise OverloadedError(problem, RETRY_AFTER, usage.REASON)

    def _model_of(self, request: Advance, session: Session) -> Model:
        """The model version that a session began with."""
        key = ModelKey(session.snapshot.model, session.snapshot.version)
        if request.model not in ("", key.name):
            raise SequenceStateError(f"the session is of {key}, the request names {request.model!r}", "model")
        if request.version not in (0, key.version):
            raise SequenceStateError(f"the session is of {key}, the request names version {request.version}", "version")
        try:
            return self._catalog.find(key.name, key.version, resumes=True)
        except ModelNotFoundError:
            raise SequenceStateError(f"the session is of {key}, which is not served here", "session_id") from None


def _new_session(request: Advance, spec: ModelSpec) -> Session:
    snapshot = encode_snapshot(spec, request.initial_step, request.initial_state)
    return Session(format=FORMAT, owner=request.owner, session_id=request.session_id, snapshot=snapshot)


def _check_values(request: Advance, values: Float32Array, spec: ModelSpec) -> None:
    if values.ndim != 2 or values.shape[1] != spec.input_size:
        problem = f"shape {list(values.shape)}, [steps, {spec.input_size}] expected by {spec.key}"
        raise InvalidRequestError(problem, "values")
    if not len(values) and not (request.start or request.end):
        raise InvalidRequestError("no timesteps, which only the start or the end of a session may have", "values")


def _place(request: Advance, session: Session, values: Float32Array, spec: ModelSpec) -> tuple[int, State, bool]:
    """Where the chunk belongs: the number of its first step, the state before it, and whether it was applied before."""
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
        raise SessionNotFoundError(f"no session {request.session_id!r}", "session_id")
    if first is not None and first > at:
        raise SequenceStateError(f"{first}, the session goes on at step {at}", "first_step")
    if first is not None and first < at:
        problem = f"another writer has moved the session on: it goes on at step {at}, not {first}"
        raise SessionTakenError(problem, "first_step")
    return at, _state_of(session.snapshot, spec), False


def _following(request: Advance, session: Session, values: Float32Array, answer: Advanced) -> Session:
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
    return first_step, len(values), hashlib.blake2b(encode(values), digest_size=16).digest()


def _state_of(snapshot: Snapshot, spec: ModelSpec) -> State:
    try:
        return decode_snapshot(snapshot, spec, "session_id")
    except InvalidRequestError as error:
        # What is kept is not the caller's: a model of other sizes was served under this name.
        raise SequenceStateError(f"the session does not fit {spec.key}: {error}", "session_id") from None


@asynccontextmanager
async def _patience(deadline: float) -> AsyncIterator[None]:
    """Bounds what a store may take."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise ExpiredError("the deadline passed before the work was done")
    try:
        async with asyncio.timeout(min(left, PATIENCE)):
            yield
    except TimeoutError:
        if left <= PATIENCE:
            raise ExpiredError("the deadline passed before the sessions' store answered") from None
        raise SessionStoreError("the sessions' store does not answer in time") from None
