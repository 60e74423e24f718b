"""Sessions: each chunk counts once, no writer overwrites another, and the bits are those of an undisturbed run."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.models import alone
from support.operators import write_identities
from support.sessions import MODEL, NEWER, ask, replicas
from support.values import random_values

from unroll_engine.async_engine import AsyncEngine
from unroll_engine.errors import ExpiredError, InvalidRequestError, OverloadedError, RequestError, SequenceStateError
from unroll_engine.models.spec import Float32Array, ModelKey
from unroll_proto.v1.session_pb2 import Session
from unroll_server.errors import SessionExpiredError, SessionNotFoundError, SessionStoreError, SessionTakenError
from unroll_server.identity.quotas import Quotas
from unroll_server.identity.tokens import Identities
from unroll_server.repository.catalog import Catalog
from unroll_server.sessions.chunk import Advanced
from unroll_server.sessions.memory_store import MemoryStore
from unroll_server.sessions.service import Sessions
from unroll_server.sessions.store import Kept, Store
from unroll_server.telemetry.metrics import Metrics


async def test_each_step_belongs_to_one_of_the_writers_that_race_for_it(
    make: Callable[[], Store],
) -> None:
    applied: dict[int, tuple[Float32Array, bytes]] = {}
    taken = 0

    async def write(sessions: Sessions, writer: int) -> None:
        nonlocal taken
        random, step, chunks = np.random.default_rng(writer), 0, 0
        while chunks < 8:
            values = random_values(int(random.integers(1, 9)), int(random.integers(2**31)))
            try:
                done = await sessions.advance(ask("s", values, first_step=step if chunks % 2 else None))
            except SessionTakenError:
                taken += 1
                found = await sessions.store.get("", "s")
                assert found is not None
                step = found.session.snapshot.step
                continue
            assert done.first_step not in applied
            applied[done.first_step] = values, done.states.tobytes()
            step, chunks = done.step, chunks + 1

    async with replicas(make(), make(), make()) as every:
        await every[0].advance(ask("s", start=True, model="m", version=1))
        await asyncio.gather(*(write(sessions, writer) for writer, sessions in enumerate(every)))
    assert len(applied) == 24
    assert taken
    whole = np.concatenate([applied[step][0] for step in sorted(applied)])
    states = alone(MODEL, whole, None)[1]
    for step, (values, answered) in applied.items():
        assert states[step : step + len(values)].tobytes() == answered


class Lossy:
    """A store that writes but loses its answers while `lost`."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.lost = False

    def __getattr__(self, name: str) -> object:
        return getattr(self.store, name)

    async def get(self, owner: str, session_id: str) -> Kept | None:
        return await self.store.get(owner, session_id)

    async def put(self, session: Session, before: bytes | None) -> bool:
        done = await self.store.put(session, before)
        if self.lost:
            raise SessionStoreError("lost")
        return done


async def test_a_chunk_that_is_sent_again_after_a_lost_answer_counts_once() -> None:
    lossy = Lossy(MemoryStore(60, 100))
    values = random_values(30)
    expected = alone(MODEL, values, None)[1]
    async with replicas(lossy) as (sessions,):  # type: ignore[arg-type]  # by __getattr__ it has the rest
        for begin, end in ((0, 10), (10, 20), (20, 30)):
            request = ask(
                "s", values[begin:end], model="m", version=1, first_step=begin, start=begin == 0, end=end == 30
            )
            lossy.lost = True
            with pytest.raises(SessionStoreError):
                await sessions.advance(request)
            lossy.lost = False
            for _ in range(2):
                done = await sessions.advance(request)
                assert done.states.tobytes() == expected[begin:end].tobytes()
                assert (done.first_step, done.step) == (begin, end)
                assert done.state[0].tobytes() == expected[end - 1 : end].tobytes()
        with pytest.raises(SessionNotFoundError):
            await sessions.advance(ask("s", values[:1], first_step=30))
        with pytest.raises(SessionNotFoundError):
            await sessions.advance(ask("s", values[:1]))


@pytest.mark.parametrize(("cause", "error"), [("room", SessionExpiredError), ("operator", SessionNotFoundError)])
async def test_a_session_removed_while_its_chunk_is_computed_was_not_taken_by_a_writer(
    cause: str, error: type[RequestError]
) -> None:
    class Removing(MemoryStore):
        async def put(self, session: Session, before: bytes | None) -> bool:
            if before is not None and cause == "operator":
                await self.remove("", "s")
            elif before is not None:
                await super().put(Session(format=1, session_id="other"), None)
            return await super().put(session, before)

    values = random_values(3)
    async with replicas(Removing(60, 1)) as (sessions,):
        for first_step in (None, 3):
            start = ask("s", values, model="m", version=1, start=True)
            await sessions.advance(start)
            with pytest.raises(error):
                await sessions.advance(ask("s", values, first_step=first_step))
            # A restarted session does not need the old one.
            await sessions.store.remove("", "other")
            await sessions.advance(start)
            again = await sessions.advance(start)
            assert (again.step, again.states.tobytes()) == (3, alone(MODEL, values, None)[1].tobytes())
            found = await sessions.store.get("", "s")
            assert found is not None
            assert found.session.snapshot.step == 3
            await sessions.store.remove("", "s")
            await sessions.store.remove("", "other")


async def test_a_session_stays_on_its_version_and_belongs_to_its_owner() -> None:
    values = random_values(4)
    async with replicas(MemoryStore(60, 100)) as (sessions,):
        begun = await sessions.advance(ask("s", values, model="m", version=1, start=True, owner="ann"))
        assert (await sessions.advance(ask("s", values, model="m", start=True, owner="bob"))).model is NEWER
        assert begun.model is (await sessions.advance(ask("s", values, owner="ann"))).model is MODEL
        assert [await sessions.store.count(ModelKey("m", version), b"") for version in (1, 2)] == [1, 1]
        refused = [
            ({"model": "m", "version": 2}, SequenceStateError, "the session is of m/1, the request names version 2"),
            ({"model": "x"}, SequenceStateError, "the session is of m/1, the request names 'x'"),
            (
                {"values": np.zeros((1, 5), np.float32)},
                InvalidRequestError,
                r"shape \[1, 5\], m/1 expects \[steps, 3\]",
            ),
            ({"values": values[:0]}, InvalidRequestError, "no timesteps"),
            ({"session_id": ""}, InvalidRequestError, "0 bytes, 1 to 128 allowed"),
            ({"session_id": "ä" * 65}, InvalidRequestError, "130 bytes"),
            ({"first_step": 9}, SequenceStateError, "9, the session continues at step 8"),
            ({"start": True, "first_step": 9}, SequenceStateError, "9, the session starts at step 0"),
        ]
        for more, kind, says in refused:
            with pytest.raises(kind, match=says):
                await sessions.advance(replace(ask("s", values, owner="ann"), **more))  # type: ignore[arg-type]
        for owner in ("", "eve"):
            with pytest.raises(SessionNotFoundError, match="no session 's'"):
                await sessions.advance(ask("s", values, owner=owner))
        assert [(each.owner, each.step) for each in await sessions.list()] == [("ann", 8), ("bob", 4)]
        assert await sessions.end("ann", "s")
        assert not await sessions.end("ann", "s")
        with pytest.raises(SessionNotFoundError):
            await sessions.advance(ask("s", values, owner="ann"))


async def test_a_session_stays_on_the_content_of_its_version_or_is_refused() -> None:
    values = random_values(6)
    old, new = (
        replace(model, spec=replace(MODEL.spec, bundle=bundle)) for model, bundle in ((MODEL, b"A"), (NEWER, b"B"))
    )
    catalog = Catalog([old])
    engine = AsyncEngine([old, new], max_lanes=4, tick_steps=5, max_queued_steps=1000, metrics=Metrics())
    sessions = Sessions(MemoryStore(60, 100), catalog, engine)
    try:
        await sessions.advance(ask("s", values[:2], start=True))
        draining = catalog.find("m", 1)
        replacement = catalog.add(new)
        assert [await sessions.store.count(MODEL.spec.key, bundle) for bundle in (b"A", b"B", b"")] == [1, 0, 0]
        done = await sessions.advance(ask("s", values[2:4]))
        assert done.model is old
        assert done.states.tobytes() == alone(old, values, None)[1][2:4].tobytes()
        catalog.remove(draining)
        says = "^session_id: the session is of m/1 with bundle 41, served is m/1 with bundle 42$"
        for first_step in (None, 2, 4):
            with pytest.raises(SequenceStateError, match=says):
                await sessions.advance(ask("s", values[2:4], first_step=first_step))
        assert (await sessions.advance(ask("s", values, start=True))).model is new
        assert [await sessions.store.count(MODEL.spec.key, bundle) for bundle in (b"A", b"B")] == [0, 1]
        # An ended session keeps no version loaded, and can't be answered again without it.
        last = ask("s", values, first_step=6, end=True)
        assert (await sessions.advance(last)).states.tobytes() == (await sessions.advance(last)).states.tobytes()
        assert await sessions.store.count(MODEL.spec.key, b"B") == 0
        catalog.retire(replacement)
        catalog.remove(replacement)
        with pytest.raises(SessionNotFoundError, match="no session 's'"):
            await sessions.advance(last)
    finally:
        await asyncio.to_thread(engine.close)
        await sessions.close()


async def test_a_refused_late_or_cancelled_call_leaves_the_session_as_it_was() -> None:
    values = random_values(3000)
    catalog = Catalog([MODEL, NEWER])
    async with replicas(MemoryStore(60, 100), queued=4000, catalog=catalog) as (sessions,):
        done: Advanced = await sessions.advance(ask("s", values[:3], model="m", version=1, start=True))
        for _ in range(5):
            calls = [asyncio.create_task(sessions.advance(ask("s", values))) for _ in range(20)]
            await asyncio.sleep(0)
            for call in calls:
                call.cancel()
            ends = await asyncio.gather(*calls, return_exceptions=True)
            assert {type(end) for end in ends} <= {asyncio.CancelledError, OverloadedError}
        with pytest.raises(ExpiredError):
            await sessions.advance(ask("s", values, deadline=time.monotonic()))
        crowd = [sessions.advance(ask(f"{n}", values, model="m", version=1, start=True)) for n in range(30)]
        outcomes = await asyncio.gather(*crowd, return_exceptions=True)
        refused = [n for n, outcome in enumerate(outcomes) if isinstance(outcome, OverloadedError)]
        assert refused
        for n in refused:
            with pytest.raises(SessionNotFoundError):
                await sessions.advance(ask(f"{n}", values))
        again = await sessions.advance(ask("s", values[3:10], first_step=done.step))
        assert again.states.tobytes() == alone(MODEL, values[:10], None)[1][3:].tobytes()
        assert not catalog.find("m", 1).references


async def test_an_identity_has_at_most_its_quota_of_sessions(tmp_path: Path) -> None:
    values = random_values(2)
    identities = Identities(write_identities(tmp_path / "identities.toml", ann={"max_sessions": 2}, bob={}))
    async with replicas(MemoryStore(60, 100), quotas=Quotas(identities)) as (sessions,):
        for n in range(2):
            await sessions.advance(ask(f"{n}", values, start=True, owner="ann"))
        with pytest.raises(OverloadedError, match="ann may have at most 2 sessions at once") as caught:
            await sessions.advance(ask("2", values, start=True, owner="ann"))
        assert caught.value.reason == "IDENTITY_LIMIT"
        await sessions.advance(ask("1", values, start=True, owner="ann"))
        await sessions.advance(ask("2", values, start=True, owner="bob"))
        await sessions.advance(ask("1", values, end=True, owner="ann"))
        await sessions.advance(ask("2", values, start=True, owner="ann"))


async def test_a_version_is_referenced_until_the_session_is_stored() -> None:
    catalog = Catalog([MODEL])
    engine = AsyncEngine([MODEL], max_lanes=4, tick_steps=5, max_queued_steps=10**6, metrics=Metrics())
    references: list[int] = []

    class Watched(MemoryStore):
        async def put(self, session: Session, before: bytes | None) -> bool:
            references.append(catalog.find("m", 1).references)
            return await super().put(session, before)

    sessions = Sessions(Watched(ttl=60, max_sessions=10), catalog, engine)
    try:
        await sessions.advance(ask(values=random_values(3), start=True))
        await sessions.advance(ask(end=True))
        assert references == [1, 1]
        assert not catalog.find("m", 1).references
    finally:
        await asyncio.to_thread(engine.close)
        await sessions.close()
