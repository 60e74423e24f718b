"""Sessions: each chunk is stored by compare-and-set, so that two writers never continue from the same state."""

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
    RequestError,
    SequenceStateError,
)
from unroll_engine.models.loader import Model
from unroll_engine.models.spec import ModelKey
from unroll_engine.readout import check_has_state
from unroll_engine.snapshots import check_bundle
from unroll_proto.v1.session_pb2 import Session
from unroll_server import caller
from unroll_server.config import MAX_KEY_BYTES
from unroll_server.errors import SessionExpiredError, SessionStoreError, SessionTakenError
from unroll_server.identity.quotas import Quotas
from unroll_server.repository.catalog import Catalog
from unroll_server.repository.version import LoadedVersion
from unroll_server.sequence import run_chunk
from unroll_server.sessions.bindings import Bindings
from unroll_server.sessions.chunk import Advance, Advanced, check_values, locate, new_session, no_session, successor
from unroll_server.sessions.store import Kept, Listed, Store

REASON = "SESSION_"
"""Prefix of the reasons of errors about sessions."""
STORE_TIMEOUT = 10.0
"""Most seconds for one answer of a store; the caller's deadline may leave less."""


class Sessions:
    """Advances sessions whose state a store keeps.

    A chunk is computed from the state that was read, and applied unless another call applied one meanwhile. Two
    concurrent calls for one session are two writers; a caller that needs an order waits for each answer.

    Args:
        store: Keeps the sessions.
        catalog: Finds the models.
        engine: Runs them.
        count: Called with the outcome of each request: "started", "advanced", "repeated" or "ended"; "unknown",
            "expired", "taken", "room" or "store" for the error of this name; and with "disconnected" for each session
            that ended with its connection.
        quotas: Bounds the sessions of each owner; None for no bound.
        refresh_for: Loads the version of a session that is not served here yet, if the repository has it.

    Attributes:
        store: The store.
    """

    def __init__(
        self,
        store: Store,
        catalog: Catalog,
        engine: AsyncEngine,
        count: Callable[[str], None] = lambda _: None,
        quotas: Quotas | None = None,
        refresh_for: Callable[[ModelKey], Awaitable[None]] | None = None,
    ) -> None:
        self.store = store
        self._catalog = catalog
        self._engine = engine
        self._count = count
        self._quotas = quotas
        self._refresh_for = refresh_for
        self._bindings = Bindings(store, count)

    async def advance(self, request: Advance) -> Advanced:
        """Computes and applies the next steps of a session.

        With `first_step`, the last applied chunk is answered again, with the same bits, and applied once. A
        call that fails or is cancelled leaves the session as it was, unless it is cancelled while the store writes:
        then the chunk may have been applied.

        Raises:
            InvalidRequestError: the id, the number of features or the number of steps is wrong.
            ModelNotFoundError: the model or the version is not served.
            SequenceStateError: the chunk is ahead of the session, or names another model or version.
            SessionNotFoundError: there is no such session.
            SessionExpiredError: it expired or made room for others.
            SessionTakenError: another writer has advanced it.
            SessionRoomError: there is no room for it.
            SessionStoreError: the store does not answer.
            OverloadedError, ExpiredError, InternalError: see AsyncEngine.
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
        """Returns up to `limit` sessions of all owners, the most recently used first.

        Raises:
            SessionStoreError: the store does not answer.
        """
        async with _bounded(math.inf):
            return await self.store.listed(limit)

    async def end(self, owner: str, session_id: str) -> bool:
        """Ends a session, even while it advances; returns True if there was one.

        Raises:
            SessionStoreError: the store does not answer.
        """
        async with _bounded(math.inf):
            return await self.store.remove(owner, session_id)

    async def close(self) -> None:
        """Ends the sessions that are bound to a connection, since none outlives the server, and closes the store."""
        await self._bindings.close()
        await self.store.close()

    async def _advance(self, request: Advance) -> tuple[Advanced, str]:
        size = len(request.session_id.encode())
        if not 1 <= size <= MAX_KEY_BYTES:
            raise InvalidRequestError(f"{size} bytes, 1 to {MAX_KEY_BYTES} allowed", "session_id")
        # The reference lasts until the store has the session: from then on the store's count keeps the version loaded.
        if request.start:
            # Found before the first await: the version that the caller just picked may drain meanwhile.
            resumes = None if request.initial_state is None else request.initial_bundle
            with self._catalog.find(request.model, request.version, resumes=resumes).acquired() as model:
                check_has_state(model.spec, "model")
                kept = await self._read(request)
                if kept is None or kept.session.ended:
                    await self._check_quota(request)
                session = new_session(request, model.spec)
                if request.connection is not None:
                    session.bound = self._bindings.token_of(request.connection)
                return await self._apply(request, kept, session, model)
        kept = await self._read(request)
        if kept is None:
            raise no_session(request)
        with (await self._version_of(request, kept.session)).acquired() as model:
            return await self._apply(request, kept, kept.session, model)

    async def _apply(self, request: Advance, kept: Kept | None, session: Session, model: Model) -> tuple[Advanced, str]:
        """Computes the steps and stores the session after them, unless another writer was faster."""
        spec = model.spec
        values = request.values(spec) if callable(request.values) else request.values
        check_values(request, values, spec)
        first_step, state, repeats = locate(request, session, values, spec)
        if len(values):
            wanted = request.keep_states
            logits, states, after = await run_chunk(self._engine, model, values, state, request.deadline, wanted)
        else:
            logits, states = np.empty((0, spec.output_size), np.float32), np.empty((0, spec.hidden_size), np.float32)
            after = state
        answer = Advanced(model, first_step, logits, states, after)
        if repeats:
            return answer, "repeated"
        after_it = successor(request, session, values, answer)
        if await self._put(request, after_it, kept.revision if kept else None):
            return answer, _outcome(request)
        # Another writer was faster, an operator has ended the session, or it has made room for others.
        found = await self._read(request)
        if found is None and not request.start:
            raise no_session(request)
        if found is None and await self._put(request, after_it, None):
            return answer, _outcome(request)
        # The faster writer may be an earlier attempt of this call, whose answer was lost.
        numbered = request.start or request.first_step is not None
        if numbered and found is not None and found.session == after_it:
            return answer, "repeated"
        raise SessionTakenError("another writer has advanced the session meanwhile", "session_id")

    async def _put(self, request: Advance, session: Session, before: bytes | None) -> bool:
        async with _bounded(request.deadline):
            if request.connection is None:
                stored = await self.store.put(session, before)
            else:
                stored = await self._bindings.put(request.connection, session, before)
        if stored:
            caller.current.get().committed = True
        return stored

    async def _read(self, request: Advance) -> Kept | None:
        async with _bounded(request.deadline):
            try:
                return await self.store.get(request.owner, request.session_id)
            except SessionExpiredError:
                if request.start:
                    return None
                raise

    async def _check_quota(self, request: Advance) -> None:
        async def owned() -> int:
            async with _bounded(request.deadline):
                return await self.store.owned(request.owner)

        if self._quotas and not request.end:
            await self._quotas.check_sessions(request.owner, owned)

    async def _version_of(self, request: Advance, session: Session) -> LoadedVersion:
        """Finds the version that a session started on."""
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
            # An ended session keeps no version loaded.
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
async def _bounded(deadline: float) -> AsyncIterator[None]:
    """Bounds the time of a store's answer."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise ExpiredError("the deadline passed before the work was done")
    try:
        async with asyncio.timeout(min(left, STORE_TIMEOUT)):
            yield
    except TimeoutError:
        if left <= STORE_TIMEOUT:
            raise ExpiredError("the deadline passed before the sessions' store answered") from None
        raise SessionStoreError("the sessions' store does not answer in time") from None
