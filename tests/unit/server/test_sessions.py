"""Sessions: every chunk counts once, no writer overtakes another, and the bits are those of an undisturbed run."""

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.models import alone, random_network, served
from support.redis_server import RedisServer, redis_executable

from unroll_engine.async_engine import AsyncEngine
from unroll_engine.errors import ExpiredError, InvalidRequestError, OverloadedError, RequestError, SequenceStateError
from unroll_engine.models.spec import Float32Array, ModelKey
from unroll_proto.v1.session_pb2 import Session
from unroll_server.errors import SessionExpiredError, SessionNotFoundError, SessionStoreError, SessionTakenError
from unroll_server.repository.catalog import Catalog
from unroll_server.sessions.chunks import Advance, Advanced
from unroll_server.sessions.memory import MemoryStore
from unroll_server.sessions.redis_store import RedisStore
from unroll_server.sessions.service import Sessions
from unroll_server.sessions.store import Kept, Store
from unroll_server.telemetry.metrics import Metrics

MODEL = served(random_network())
NEWER = served(random_network(seed=1), version=2)
IDS = itertools.count()


def values_of(seed: int, steps: int) -> Float32Array:
    return np.random.default_rng(seed).normal(size=(steps, MODEL.spec.input_size)).astype(np.float32)


def ask(session_id: str = "s", values: Float32Array | None = None, **more: object) -> Advance:
    none = np.empty((0, MODEL.spec.input_size), np.float32)
    plain = Advance("", session_id, "", 0, False, False, None, none if values is None else values)
    return replace(plain, **more)  # type: ignore[arg-type]  # each test knows its fields


@asynccontextmanager
async def replicas(*stores: Store, queued: int = 10**6) -> AsyncIterator[list[Sessions]]:
    """A replica for each store, each with an engine of its own."""
    engines = [
        AsyncEngine([MODEL, NEWER], max_lanes=4, tick_steps=5, max_queued_steps=queued, metrics=Metrics())
        for _ in stores
    ]
    try:
        yield [Sessions(store, Catalog([MODEL, NEWER]), engine) for store, engine in zip(stores, engines, strict=True)]
    finally:
        for engine in engines:
            await asyncio.to_thread(engine.close)
        for store in {id(store): store for store in stores}.values():
            await store.close()


class Plain:
    """What sessions are meant to be: the chunks of each, applied one after the other."""

    def __init__(self) -> None:
        self.values: dict[str, Float32Array] = {}
        self.last: dict[str, tuple[int, bytes]] = {}

    def advance(self, request: Advance) -> bytes | type[RequestError]:
        name, values = request.session_id, request.values
        assert not callable(values)
        if request.start:
            self.values[name] = values[:0]
        elif name not in self.values:
            return SessionNotFoundError
        step, first = len(self.values[name]), request.first_step
        if not request.start and first is not None and first != step:
            if self.last.get(name) == (first, values.tobytes()):
                return alone(MODEL, self.values[name], None)[1][first:].tobytes()
            return SequenceStateError if first > step else SessionTakenError
        self.values[name] = np.concatenate([self.values[name], values])
        self.last[name] = (step, values.tobytes())
        answer = alone(MODEL, self.values[name], None)[1][step:].tobytes()
        if request.end:
            del self.values[name], self.last[name]
        return answer


STEPS = st.tuples(
    st.sampled_from("ab"),
    st.integers(0, 1),  # which replica
    st.sampled_from(["start", "go on", "go on", "numbered", "numbered", "again", "stale", "gap", "end"]),
    st.integers(1, 7),
)


async def tell(sessions: Sessions, request: Advance) -> bytes | type[RequestError]:
    try:
        return (await sessions.advance(request)).states.tobytes()
    except RequestError as error:
        return type(error)


async def compare(actions: list[tuple[str, int, str, int]], stores: list[Store]) -> None:
    """Has both do the same, from either replica, and compares every answer."""
    prefix, plain = f"{next(IDS)} ", Plain()
    sent: dict[str, Advance] = {}
    async with replicas(*stores) as both:
        for number, (name, replica, action, count) in enumerate(actions):
            session_id = prefix + name
            step = len(plain.values.get(session_id, ()))
            request = ask(session_id, values_of(number, count), model="m", version=1)
            if action == "start":
                request = replace(request, start=True)
            elif action in ("numbered", "end"):
                request = replace(request, first_step=step, end=action == "end")
            elif action == "again" and session_id in sent:
                request = sent[session_id]
            elif action == "stale":
                request = replace(request, first_step=max(step - 1, 0))
            elif action == "gap":
                request = replace(request, first_step=step + 3)
            if request.first_step is not None and not request.end:
                sent[session_id] = request
            elif request.end or request.start:
                sent.pop(session_id, None)
            assert await tell(both[replica], request) == plain.advance(request), (action, request)


@settings(max_examples=60, deadline=None)
@given(actions=st.lists(STEPS, min_size=1, max_size=25))
def test_any_order_of_calls_is_answered_as_by_a_plain_run(actions: list[tuple[str, int, str, int]]) -> None:
    store = MemoryStore(60, 100)
    asyncio.run(compare(actions, [store, store]))


needs_redis = pytest.mark.skipif(redis_executable() is None, reason="there is no redis-server")


@needs_redis
def test_any_order_of_calls_on_two_replicas_is_answered_as_by_a_plain_run(tmp_path: Path) -> None:
    with RedisServer(tmp_path) as server:

        @settings(max_examples=25, deadline=None)
        @given(actions=st.lists(STEPS, min_size=1, max_size=25))
        def check(actions: list[tuple[str, int, str, int]]) -> None:
            asyncio.run(compare(actions, [RedisStore(server.url, 60), RedisStore(server.url, 60)]))

        check()


@pytest.fixture(params=["memory", "file", pytest.param("redis", marks=needs_redis)])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[], Store]]:
    """Opens a store; all are of one place where there can be several."""
    if request.param == "redis":
        with RedisServer(tmp_path) as server:
            yield lambda: RedisStore(server.url, 60)
    elif request.param == "file":
        yield lambda: MemoryStore(60, 100, tmp_path / "sessions")
    else:
        store = MemoryStore(60, 100)
        yield lambda: store


async def test_of_writers_that_race_each_step_is_one_s_and_the_bits_are_those_of_one_run(
    make: Callable[[], Store],
) -> None:
    applied: dict[int, tuple[Float32Array, bytes]] = {}
    taken = 0

    async def write(sessions: Sessions, writer: int) -> None:
        nonlocal taken
        random, step, chunks = np.random.default_rng(writer), 0, 0
        while chunks < 8:
            values = values_of(int(random.integers(2**31)), int(random.integers(1, 9)))
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
    """A store whose answers get lost on the way back."""

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


async def test_a_caller_that_lost_an_answer_asks_again_and_it_counts_once() -> None:
    lossy = Lossy(MemoryStore(60, 100))
    values = values_of(0, 30)
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


@pytest.mark.parametrize(("leaves", "error"), [("room", SessionExpiredError), ("operator", SessionNotFoundError)])
async def test_a_session_that_leaves_while_its_chunk_is_computed_was_not_taken_by_a_writer(
    leaves: str, error: type[RequestError]
) -> None:
    class Leaving(MemoryStore):
        async def put(self, session: Session, before: bytes | None) -> bool:
            if before is not None and leaves == "operator":
                await self.remove("", "s")
            elif before is not None:
                await super().put(Session(format=1, session_id="other"), None)
            return await super().put(session, before)

    values = values_of(0, 3)
    async with replicas(Leaving(60, 1)) as (sessions,):
        for first_step in (None, 3):
            start = ask("s", values, model="m", version=1, start=True)
            await sessions.advance(start)
            with pytest.raises(error):
                await sessions.advance(ask("s", values, first_step=first_step))
            # One that begins anew needs nothing of what was there.
            await sessions.store.remove("", "other")
            await sessions.advance(start)
            again = await sessions.advance(start)
            assert (again.step, again.states.tobytes()) == (3, alone(MODEL, values, None)[1].tobytes())
            found = await sessions.store.get("", "s")
            assert found is not None
            assert found.session.snapshot.step == 3
            await sessions.store.remove("", "s")
            await sessions.store.remove("", "other")


async def test_a_session_stays_on_its_version_and_another_s_owner_has_none() -> None:
    values = values_of(0, 4)
    async with replicas(MemoryStore(60, 100)) as (sessions,):
        begun = await sessions.advance(ask("s", values, model="m", version=1, start=True, owner="ann"))
        assert (await sessions.advance(ask("s", values, model="m", start=True, owner="bob"))).model is NEWER
        assert begun.model is (await sessions.advance(ask("s", values, owner="ann"))).model is MODEL
        assert [await sessions.store.count(ModelKey("m", version), b"") for version in (1, 2)] == [1, 1]
        refused = [
            ({"model": "m", "version": 2}, SequenceStateError, "the session is of m/1, the request names version 2"),
            ({"model": "x"}, SequenceStateError, "the session is of m/1, the request names 'x'"),
            ({"values": np.zeros((1, 5), np.float32)}, InvalidRequestError, r"shape \[1, 5\], \[steps, 3\] expected"),
            ({"values": values[:0]}, InvalidRequestError, "no timesteps"),
            ({"session_id": ""}, InvalidRequestError, "0 bytes, 1 to 128 allowed"),
            ({"session_id": "ä" * 65}, InvalidRequestError, "130 bytes"),
            ({"first_step": 9}, SequenceStateError, "9, the session goes on at step 8"),
            ({"start": True, "first_step": 9}, SequenceStateError, "9, the session begins at step 0"),
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
    values = values_of(0, 6)
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
        # One that has ended keeps no version, and with it gone can't be answered again: it is over.
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


async def test_what_is_refused_late_or_cancelled_leaves_the_session_as_it_was() -> None:
    values = values_of(0, 3000)
    async with replicas(MemoryStore(60, 100), queued=4000) as (sessions,):
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
        assert not sessions._catalog.find("m", 1).references


async def test_an_identity_has_no_more_sessions_than_it_may() -> None:
    values = values_of(0, 2)
    async with replicas(MemoryStore(60, 100)) as (open_to_all,):
        sessions = Sessions(open_to_all.store, open_to_all._catalog, open_to_all._engine, limit_of={"ann": 2}.get)
        for n in range(2):
            await sessions.advance(ask(f"{n}", values, start=True, owner="ann"))
        with pytest.raises(OverloadedError, match="ann has 2 sessions and may have 2") as caught:
            await sessions.advance(ask("2", values, start=True, owner="ann"))
        assert caught.value.reason == "IDENTITY_LIMIT"
        await sessions.advance(ask("1", values, start=True, owner="ann"))
        await sessions.advance(ask("2", values, start=True, owner="bob"))
        await sessions.advance(ask("1", values, end=True, owner="ann"))
        await sessions.advance(ask("2", values, start=True, owner="ann"))


async def test_a_model_is_held_until_its_session_is_stored() -> None:
    catalog = Catalog([MODEL])
    engine = AsyncEngine([MODEL], max_lanes=4, tick_steps=5, max_queued_steps=10**6, metrics=Metrics())
    held: list[int] = []

    class Watched(MemoryStore):
        async def put(self, session: Session, before: bytes | None) -> bool:
            held.append(catalog.find("m", 1).references)
            return await super().put(session, before)

    sessions = Sessions(Watched(ttl=60, max_sessions=10), catalog, engine)
    try:
        await sessions.advance(ask(values=values_of(0, 3), start=True))
        await sessions.advance(ask(end=True))
        assert held == [1, 1]
        assert not catalog.find("m", 1).references
    finally:
        await asyncio.to_thread(engine.close)
        await sessions.close()
