"""Stores of sessions: one writer at a time, and an expired session differs from one that never was."""

import asyncio
import re
import shutil
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import redis
from support.redis_server import RedisServer, needs_redis
from support.redis_topologies import needs_whole_redis, with_a_sentinel
from support.waiting import until

from unroll_engine.errors import SequenceStateError
from unroll_engine.models.spec import ModelKey
from unroll_proto.v1.session_pb2 import Session
from unroll_proto.v1.unroll_pb2 import Snapshot
from unroll_server.errors import SessionExpiredError, SessionRoomError, SessionStoreError
from unroll_server.sessions.memory_store import MemoryStore
from unroll_server.sessions.redis_store import RedisStore
from unroll_server.sessions.store import Store

KEY = ModelKey("m", 1)


class Clock:
    def __init__(self) -> None:
        self.now = 1e9

    def __call__(self) -> float:
        return self.now


def session(session_id: str = "s", step: int = 0, owner: str = "", ended: bool = False, **of: Any) -> Session:
    made = Session(format=1, owner=owner, session_id=session_id, ended=ended)
    made.snapshot.MergeFrom(Snapshot(**{"format": 1, "model": KEY.name, "version": 1, "step": step, **of}))
    return made


async def _is_expired(store: Store, session_id: str) -> bool:
    try:
        assert await store.get("", session_id) is None
    except SessionExpiredError:
        return True
    return False


async def until_it_raises(call: Callable[[], Awaitable[object]], kind: type[Exception]) -> None:
    async def raised() -> bool:
        try:
            await call()
        except kind:
            return True
        return False

    await until(raised)


async def test_only_one_writer_replaces_a_revision(make: Callable[[], Store], request: pytest.FixtureRequest) -> None:
    store, name = make(), request.node.name
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


async def test_ids_belong_to_owners_whatever_their_characters(
    make: Callable[[], Store], request: pytest.FixtureRequest
) -> None:
    store, name = make(), request.node.name
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


async def test_sessions_are_counted_by_content_and_owner_and_listed_latest_first(
    make: Callable[[], Store], request: pytest.FixtureRequest
) -> None:
    store, name = make(), request.node.name
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


@pytest.mark.parametrize("shared", [False, True])
async def test_an_expired_session_differs_from_one_that_never_was_until_it_starts_anew(
    shared: bool, tmp_path: Path
) -> None:
    clock = Clock()
    store = MemoryStore(10, 100, tmp_path / "sessions" if shared else None, clock=clock)
    assert await store.put(session("ended", ended=True), None)
    assert await store.put(session(), None)
    clock.now += 11
    assert await store.count(KEY, b"") == 0
    with pytest.raises(SessionExpiredError, match=r"^session_id: the session was unused for more than 10 s"):
        await store.get("", "s")
    assert await store.get("", "ended") is None
    assert await store.put(session(step=1), None)
    assert await store.get("", "s") is not None
    await store.close()


@needs_redis
async def test_redis_tells_an_expired_session_from_one_that_never_was(redis_server: RedisServer) -> None:
    patient = RedisStore(redis_server.url, 60)
    # Redis keeps its own time and remembers an expiry for the session's TTL: a slow test needs a longer one.
    for version, ttl in enumerate((0.3, 3, 30), 80):
        name = f"expires after {ttl} s"
        store = RedisStore(redis_server.url, ttl)
        assert await store.put(session(f"{name}, ended", ended=True, version=version), None)
        assert await store.put(session(name, version=version), None)
        while await store.count(ModelKey("m", version), b""):
            pass
        remembered = await _is_expired(store, name)
        await store.close()
        if remembered:
            break
    else:
        pytest.fail("no expiry was remembered")
    assert await patient.get("", f"{name}, ended") is None
    assert await patient.put(session(name, 1, version=version), None)
    assert await patient.get("", name) is not None
    await patient.close()


async def test_each_use_extends_a_session() -> None:
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


async def test_ended_and_then_least_recently_used_sessions_make_room() -> None:
    events: list[str] = []
    store = MemoryStore(60, 3, count=events.append)
    for name in "abc":
        assert await store.put(session(name, ended=name == "c"), None)
    assert await store.get("", "a") is not None
    assert await store.put(session("d"), None)
    assert await store.get("", "c") is None
    assert events == []
    assert await store.put(session("e"), None)
    with pytest.raises(SessionExpiredError, match="made room"):
        await store.get("", "b")
    assert {each.session_id for each in await store.listed(10)} == {"a", "d", "e"}
    for n in range(20):
        assert await store.put(session(f"x{n}"), None)
    assert len(await store.listed(100)) == 3
    # As many evictions are remembered as there can be sessions.
    remembered = [await _is_expired(store, f"x{n}") for n in range(17)]
    assert remembered == [False] * 14 + [True] * 3
    assert events == ["evicted"] * 21
    await store.close()


async def test_a_session_of_another_format_is_refused(
    make: Callable[[], Store], request: pytest.FixtureRequest
) -> None:
    store, name = make(), request.node.name
    newer = session(name)
    newer.format = 2
    assert await store.put(newer, None)
    with pytest.raises(SequenceStateError, match="stored in format 2, this server reads format 1"):
        await store.get("", name)
    assert await store.remove("", name)
    await store.close()


@needs_redis
async def test_a_full_redis_refuses_new_sessions_and_serves_the_others(tmp_path: Path) -> None:
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
async def test_a_redis_that_is_killed_and_restarted_has_every_session(tmp_path: Path) -> None:
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


async def test_workers_share_a_file_and_lose_no_update(tmp_path: Path) -> None:
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


async def test_on_a_full_disk_sessions_continue_and_expired_ones_make_room(
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
    # The whole table fits, with its log.
    assert sum((tmp_path / name).stat().st_size for name in ("sessions", "sessions-wal")) < free.free + 2**18
    assert await store.remove("", names[0])
    found = await store.get("", names[1])
    assert found is not None
    assert await store.put(session(names[1], 1, ended=True), found.revision)
    clock.now += 100
    # Remembered expiries take room, too.
    for name in names[kept : kept + kept // 2]:
        assert await store.put(session(name, state=[bytes(512)]), None)
    await store.close()


@needs_whole_redis
async def test_sessions_continue_on_the_replica_that_sentinels_promote(tmp_path: Path) -> None:
    with with_a_sentinel(tmp_path) as watched:
        store = RedisStore(watched.url, 60)
        assert await store.put(session("s", 1), None)
        kept = await store.get("", "s")
        assert kept is not None
        watched.fail_over()

        async def continues() -> bool:
            # The first attempt can count although its answer was lost.
            with suppress(SessionStoreError):
                await store.put(session("s", 2), kept.revision)
                now = await store.get("", "s")
                return now is not None and now.session.snapshot.step == 2
            return False

        await until(continues)
        await store.close()


@needs_whole_redis
async def test_the_primaries_of_a_cluster_share_the_sessions(cluster_url: str) -> None:
    store = RedisStore(cluster_url, 60)
    for number in range(64):
        assert await store.put(session(f"shared {number}"), None)
    ports = [int(port) for port in re.findall(r":(\d+)", cluster_url)]
    for port in ports:
        with redis.Redis(port=port) as primary:
            assert primary.keys("*session:*:was")
    await store.close()
