"""Sessions: a step number compared and set for each chunk, so that no two writers go on from the same state."""

import asyncio
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import numpy as np

from unroll_engine.async_engine import AsyncEngine
from unroll_engine.errors import (
    ExpiredError,
    InvalidRequestError,
    ModelNotFoundError,
    OverloadedError,
    RequestError,
    SequenceStateError,
)
from unroll_engine.models.loader import Model
from unroll_engine.models.spec import ModelKey
from unroll_engine.snapshots import check_bundle
from unroll_proto.v1.session_pb2 import Session
from unroll_server import caller
from unroll_server.config import MAX_KEY_BYTES
from unroll_server.errors import SessionExpiredError, SessionStoreError, SessionTakenError
from unroll_server.identity import quotas as usage
from unroll_server.repository.catalog import Catalog
from unroll_server.repository.version import LoadedVersion
from unroll_server.sessions.chunks import Advance, Advanced, check_values, following, new_session, no_session, place
from unroll_server.sessions.running import compute
from unroll_server.sessions.store import Kept, Listed, Store

REASON = "SESSION_"
"""What the reasons of the errors about sessions begin with."""
RETRY_AFTER = 1.0
"""Seconds after which one who has as many sessions as they may is to try again."""
PATIENCE = 10.0
"""Seconds that a store has for one answer, where the caller's deadline leaves it as much."""


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
        refresh_for: Loads the version of a session that is not served here, if the repository has it by now.

    Attributes:
        store: As given.
    """

    def __init__(
        self,
        store: Store,
        catalog: Catalog,
        engine: AsyncEngine,
        count: Callable[[str], None] = lambda _: None,
        limit_of: Callable[[str], int | None] = lambda _: None,
        refresh_for: Callable[[ModelKey], Awaitable[None]] | None = None,
    ) -> None:
        self.store = store
        self._catalog = catalog
        self._engine = engine
        self._count = count
        self._limit_of = limit_of
        self._refresh_for = refresh_for

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
        # A model is held until the store has the session, and so counts it: nothing else keeps it.
        if request.start:
            # Found before anything is waited for: the caller may have just picked the version, and it may be draining.
            resumes = None if request.initial_state is None else request.initial_bundle
            with self._catalog.find(request.model, request.version, resumes=resumes).acquired() as model:
                kept = await self._read(request)
                if kept is None or kept.session.ended:
                    await self._check_limit(request)
                return await self._apply(request, kept, new_session(request, model.spec), model)
        kept = await self._read(request)
        if kept is None:
            raise no_session(request)
        with (await self._version_of(request, kept.session)).acquired() as model:
            return await self._apply(request, kept, kept.session, model)

    async def _apply(self, request: Advance, kept: Kept | None, session: Session, model: Model) -> tuple[Advanced, str]:
        """Computes the steps, and sets what follows them where nobody else has."""
        spec = model.spec
        values = request.values(spec) if callable(request.values) else request.values
        check_values(request, values, spec)
        first_step, state, repeats = place(request, session, values, spec)
        if len(values):
            wanted = request.keep_states
            logits, states, after = await compute(self._engine, model, values, state, request.deadline, wanted)
        else:
            logits, states = np.empty((0, spec.output_size), np.float32), np.empty((0, spec.hidden_size), np.float32)
            after = state
        answer = Advanced(model, first_step, logits, states, after)
        if repeats:
            return answer, "repeated"
        after_it = following(request, session, values, answer)
        if await self._put(request, after_it, kept.revision if kept else None):
            return answer, _outcome(request)
        # Not always another writer: the session can have been ended by an operator or made room for others meanwhile.
        found = await self._read(request)
        if found is None and not request.start:
            raise no_session(request)
        if found is None and await self._put(request, after_it, None):
            return answer, _outcome(request)
        # An earlier try of this very call, whose answer was lost, can have been the faster one.
        numbered = request.start or request.first_step is not None
        if numbered and found is not None and found.session == after_it:
            return answer, "repeated"
        raise SessionTakenError("another writer has moved the session on meanwhile", "session_id")

    async def _put(self, request: Advance, session: Session, before: bytes | None) -> bool:
        async with _patience(request.deadline):
            stored = await self.store.put(session, before)
        if stored:
            caller.current.get().committed = True
        return stored

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

    async def _version_of(self, request: Advance, session: Session) -> LoadedVersion:
        """The model version that a session began with."""
        key = ModelKey(session.snapshot.model, session.snapshot.version)
        if request.model not in ("", key.name):
            raise SequenceStateError(f"the session is of {key}, the request names {request.model!r}", "model")
        if request.version not in (0, key.version):
            raise SequenceStateError(f"the session is of {key}, the request names version {request.version}", "version")
        bundle = session.snapshot.bundle
        version = self._find(key, bundle)
        if version is None or version.bundle != bundle:
            await self._refresh(key, request.deadline)
            version = self._find(key, bundle)
        if session.ended and (version is None or version.bundle != bundle):
            # Only sessions that go on keep their version loaded.
            raise no_session(request)
        if version is None:
            raise SequenceStateError(f"the session is of {key}, which is not served here", "session_id")
        check_bundle(session.snapshot, version.spec, "session", "session_id")
        return version

    async def _refresh(self, key: ModelKey, deadline: float) -> None:
        if self._refresh_for is None:
            return
        try:
            async with asyncio.timeout(None if deadline == math.inf else max(0.0, deadline - time.monotonic())):
                await self._refresh_for(key)
        except TimeoutError:
            raise ExpiredError(f"the deadline passed before {key} was looked for") from None

    def _find(self, key: ModelKey, bundle: bytes) -> LoadedVersion | None:
        try:
            return self._catalog.find(key.name, key.version, resumes=bundle)
        except ModelNotFoundError:
            return None


def _outcome(request: Advance) -> str:
    return "ended" if request.end else "started" if request.start else "advanced"


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
