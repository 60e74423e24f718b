"""What both stores of sessions promise: one writer at a time, what is gone told apart from what never was."""

import asyncio
import shutil
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from support.redis_server import RedisServer, redis_executable

from unroll_engine.errors import SequenceStateError
from unroll_engine.models.spec import ModelKey
from unroll_proto.v1.session_pb2 import Session
from unroll_proto.v1.unroll_pb2 import Snapshot
from unroll_server.errors import SessionExpiredError, SessionRoomError, SessionStoreError
from unroll_server.sessions.memory import MemoryStore
from unroll_server.sessions.redis_store import RedisStore
from unroll_server.sessions.store import Store

needs_redis = pytest.mark.skipif(redis_executable() is None, reason="there is no redis-server")
KEY = ModelKey("m", 1)


class Clock:
    def __init__(self) -> None:
        self.now = 1e9

    def __call__(self) -> float:
        return self.now


@pytest.fixture(scope="module")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture(params=["memory", "file", pytest.param("redis", marks=needs_redis)])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[float], Store]:
    """Opens a store, where all opened in one test are of one place."""
    if request.param == "redis":
        url = request.getfixturevalue("redis_server").url
        return lambda ttl: RedisStore(url, ttl)
    if request.param == "file":
        return lambda ttl: MemoryStore(ttl, 100, tmp_path / "sessions")
    return lambda ttl: MemoryStore(ttl, 100)


def session(session_id: str = "s", step: int = 0, owner: str = "", ended: bool = False, **of: Any) -> Session:
    made = Session(format=1, owner=owner, session_id=session_id, ended=ended)
    made.snapshot.MergeFrom(Snapshot(**{"format": 1, "model": KEY.name, "version": 1, "step": step, **of}))
    return made


async def until_it_raises(call: Callable[[], Awaitable[object]], kind: type[Exception]) -> None:
    async with asyncio.timeout(30):
        while True:
            try:
                await call()
            except kind:
                return
            await asyncio.sleep(0.01)


async def test_only_one_of_two_writers_goes_on_from_a_revision(
    make: Callable[[float], Store], request: pytest.FixtureRequest
) -> None:
    store, name = make(60), request.node.name
    assert await store.get("", name) is None
    assert await store.put(session(name, 1), None)
    assert not await store.put(session(name, 1), None)
    first = await store.get("", name)
    assert first is not None
    assert first.session == session(name, 1)
    assert sorted(
        await asyncio.gather(*(store.put(session(name, 2, version=n), first.revision) for n in range(5)))
    ) == [False] * 4 + [True]
    second = await store.get("", name)
    assert second is not None
    assert second.session.snapshot.step == 2
    assert not await store.put(session(name, 3), first.revision)
    assert await store.put(session(name, 3), second.revision)
    await store.close()


async def test_owners_have_ids_of_their_own_whatever_the_characters(
    make: Callable[[float], Store], request: pytest.FixtureRequest
) -> None:
    store, name = make(60), request.node.name
    pairs = [("", f"{name}\0"), ("\0", name), ("a", f"b{name}"), ("ab", name), ("ä{}", f"{name} *\n'\"")]
    for step, (owner, each) in enumerate(pairs):
        assert await store.put(session(each, step, owner), None)
    for step, (owner, each) in enumerate(pairs):
        found = await store.get(owner, each)
        assert found is not None
        assert found.session == session(each, step, owner)
    assert await store.get("a", name) is None
    assert await store.remove(*pairs[0])
    assert not await store.remove(*pairs[0])
    assert await store.get(*pairs[0]) is None
    await store.close()


async def test_sessions_are_counted_by_model_version_and_listed_latest_first(
    make: Callable[[float], Store], request: pytest.FixtureRequest
) -> None:
    store, name = make(60), request.node.name
    old, new = ModelKey("m", 70), ModelKey("m", 71)

    async def counts() -> tuple[int, int]:
        return await store.count(old, b"B"), await store.count(new, b"")

    for n in range(3):
        assert await store.put(session(f"{name}{n}", n, version=70, bundle=b"B"), None)
    assert await store.put(session(name, owner=name), None)
    assert await counts() == (3, 0)
    assert (await store.owned(name), await store.owned(f"{name}0")) == (1, 0)
    assert (await store.count(old, b""), await store.count(old, b"C")) == (0, 0)
    # Started anew on another version, ended, and removed.
    revisions = [found.revision for n in range(3) if (found := await store.get("", f"{name}{n}"))]
    assert await store.put(session(f"{name}0", version=71), revisions[0])
    assert await counts() == (2, 1)
    assert await store.remove(name, name)
    assert await store.owned(name) == 0
    listed = [each for each in await store.listed(100) if each.session_id.startswith(name)]
    assert {(each.session_id, each.model, each.step) for each in listed} == {
        (f"{name}0", new, 0),
        (f"{name}1", old, 1),
        (f"{name}2", old, 2),
    }
    assert all(0 < each.expires_in <= 60 for each in listed)
    assert listed[0].session_id == f"{name}0"
    assert await store.put(session(f"{name}1", ended=True, version=70, bundle=b"B"), revisions[1])
    assert await store.remove("", f"{name}2")
    assert await counts() == (0, 1)
    assert [each.session_id for each in await store.listed(100) if each.session_id.startswith(name)] == [f"{name}0"]
    await store.close()


async def test_a_session_that_rested_too_long_is_told_apart_until_it_starts_anew(
    make: Callable[[float], Store], request: pytest.FixtureRequest
) -> None:
    store, name = make(0.3), request.node.name
    assert await store.put(session(f"{name} ended", ended=True, version=80), None)
    assert await store.put(session(name, version=80), None)
    async with asyncio.timeout(30):
        while await store.count(ModelKey("m", 80), b""):  # noqa: ASYNC110 (Redis tells nobody)
            await asyncio.sleep(0.01)
    with pytest.raises(SessionExpiredError, match=r"^session_id: the session rested for more than"):
        await store.get("", name)
    assert await store.get("", f"{name} ended") is None
    assert await store.put(session(name, 1, version=80), None)
    assert await store.get("", name) is not None
    await store.close()


async def test_each_use_lets_a_session_live_longer() -> None:
    clock = Clock()
    store = MemoryStore(10, 100, clock=clock)
    await store.put(session(), None)
    for _ in range(5):
        clock.now += 9
        assert await store.get("", "s") is not None
    clock.now += 11
    with pytest.raises(SessionExpiredError):
        await store.get("", "s")
    clock.now += 10
    assert await store.get("", "s") is None
    await store.close()


async def test_the_longest_unused_makes_room_ended_ones_first_and_what_is_remembered_is_bounded() -> None:
    events: list[str] = []
    store = MemoryStore(60, 3, count=events.append)
    for name in "abc":
        assert await store.put(session(name, ended=name == "c"), None)
    assert await store.get("", "a") is not None
    assert await store.put(session("d"), None)
    assert await store.get("", "c") is None
    assert events == []
    assert await store.put(session("e"), None)
    with pytest.raises(SessionExpiredError, match="make room"):
        await store.get("", "b")
    assert {each.session_id for each in await store.listed(10)} == {"a", "d", "e"}
    for n in range(20):
        assert await store.put(session(f"x{n}"), None)
    assert len(await store.listed(100)) == 3
    assert len(list(store.gone())) == 3
    assert events == ["evicted"] * 21
    await store.close()


async def test_sessions_of_another_format_are_refused_in_words(
    make: Callable[[float], Store], request: pytest.FixtureRequest
) -> None:
    store, name = make(60), request.node.name
    newer = session(name)
    newer.format = 2
    assert await store.put(newer, None)
    with pytest.raises(SequenceStateError, match="kept in format 2, this server reads 1"):
        await store.get("", name)
    assert await store.remove("", name)
    await store.close()


@needs_redis
async def test_a_full_redis_is_out_of_room_and_serves_what_it_has(tmp_path: Path) -> None:
    with RedisServer(tmp_path, "--maxmemory", "3mb", "--maxmemory-policy", "noeviction") as server:
        store = RedisStore(server.url, 60)
        big = session()
        big.snapshot.state.append(bytes(100_000))

        async def fill() -> None:
            big.session_id += "x"
            await store.put(big, None)

        assert await store.put(session("first"), None)
        await until_it_raises(fill, SessionRoomError)
        assert await store.get("", "s" + "x") is not None
        await store.close()


@needs_redis
async def test_a_redis_that_is_killed_is_an_error_and_comes_back_with_all_it_had(tmp_path: Path) -> None:
    with RedisServer(tmp_path) as server:
        store = RedisStore(server.url, 60)
        assert await store.put(session(step=5), None)
        server.kill()
        with pytest.raises(SessionStoreError, match="does not answer"):
            await store.get("", "s")
        server.start()
        found = await store.get("", "s")
        assert found is not None
        assert found.session == session(step=5)
        await store.close()


async def test_workers_share_a_file_and_none_overtakes_another(tmp_path: Path) -> None:
    stores = [MemoryStore(60, 100, tmp_path / "sessions") for _ in range(3)]
    assert await stores[0].put(session(), None)

    async def add(store: MemoryStore, times: int) -> None:
        while times:
            found = await store.get("", "s")
            assert found is not None
            times -= await store.put(session(step=found.session.snapshot.step + 1), found.revision)

    await asyncio.gather(*(add(store, 20) for store in stores))
    found = await stores[1].get("", "s")
    assert found is not None
    assert found.session.snapshot.step == 60
    for store in stores:
        await store.close()


async def test_where_the_disk_is_nearly_full_sessions_go_on_and_what_has_expired_makes_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, names = Clock(), [f"s{n}" for n in range(10_000)]
    free = shutil.disk_usage(tmp_path)._replace(free=2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    store, kept = MemoryStore(60, 10**6, tmp_path / "sessions", clock=clock), 0
    with suppress(SessionRoomError):
        while kept < len(names):
            assert await store.put(session(names[kept], state=[bytes(512)]), None)
            kept += 1
    assert 100 < kept < len(names)
    # All of what it takes, its log too.
    assert sum((tmp_path / name).stat().st_size for name in ("sessions", "sessions-wal")) < free.free + 2**18
    assert await store.remove("", names[0])
    found = await store.get("", names[1])
    assert found is not None
    assert await store.put(session(names[1], 1, ended=True), found.revision)
    clock.now += 100
    # It is remembered for a while that they were there, which takes room too.
    for name in names[kept : kept + kept // 2]:
        assert await store.put(session(name, state=[bytes(512)]), None)
    await store.close()
