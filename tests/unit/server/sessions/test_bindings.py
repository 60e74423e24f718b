"""Sessions that are bound to a connection: they end with it, whatever happens at the same time, and no other does."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.sessions import MODEL, ask, replicas
from support.values import random_values

from unroll_proto.v1.session_pb2 import Session
from unroll_server.errors import SessionNotFoundError
from unroll_server.sessions.file_store import FileBackedStore
from unroll_server.sessions.memory_store import MemoryStore
from unroll_server.sessions.store import Kept, Store


def session(name: str, step: int = 0, bound: bytes = b"", owner: str = "") -> Session:
    made = Session(format=1, owner=owner, session_id=name, bound=bound)
    made.snapshot.format, made.snapshot.model, made.snapshot.version, made.snapshot.step = 1, "m", 90, step
    return made


async def test_a_store_removes_the_sessions_that_are_bound_to_a_connection_now(
    make: Callable[[], Store], request: pytest.FixtureRequest
) -> None:
    store, name = make(), request.node.name
    mine, other = f"mine {name}".encode(), f"other {name}".encode()
    for number in range(5):
        assert await store.put(session(f"{name}{number}", bound=mine, owner=name), None)
    assert await store.put(session(f"{name} free", owner=name), None)
    # Advanced, started anew without a connection, and with another one; and a read, which extends its time.
    for number, bound in enumerate((mine, b"", other)):
        kept = await store.get(name, f"{name}{number}")
        assert kept is not None
        assert await store.put(session(f"{name}{number}", 1, bound, owner=name), kept.revision)
    assert await store.get(name, f"{name}3") is not None
    assert await store.remove(name, f"{name}4")
    assert await store.remove_bound(mine) == 2
    assert await store.remove_bound(mine) == 0
    assert await store.owned(name) == 3
    left = {each.session_id for each in await store.listed(100) if each.owner == name}
    assert left == {f"{name}1", f"{name}2", f"{name} free"}
    assert await store.get(name, f"{name}0") is None
    assert await store.remove_bound(other) == 1
    assert await store.owned(name) == 2
    await store.close()


async def test_a_file_keeps_no_bound_session(tmp_path: Path) -> None:
    for expected in ([], ["free"]):
        store = FileBackedStore(60, 100, None, tmp_path / "sessions")
        assert [each.session_id for each in await store.listed(10)] == expected
        store.confirm_takeover()
        if not expected:
            assert await store.put(session("bound", bound=b"c"), None)
            assert await store.put(session("free"), None)
        await store.close()


class Slow(MemoryStore):
    """A store whose answers take some turns of the event loop, before and after it is read or written.

    As in a store on another machine, a write that was sent is done even if nobody waits for it any more.

    Args:
        turns: The numbers of these turns for `get`, `put` and `remove_bound`.
    """

    def __init__(self, turns: tuple[tuple[int, int], ...]) -> None:
        super().__init__(60, 100)
        self._reading, self._writing, self._removing = turns

    async def get(self, owner: str, session_id: str) -> Kept | None:
        async with _slowly(*self._reading):
            return await super().get(owner, session_id)

    async def put(self, session: Session, before: bytes | None) -> bool:
        return await asyncio.shield(asyncio.create_task(self._write(session, before)))

    async def _write(self, session: Session, before: bytes | None) -> bool:
        async with _slowly(*self._writing):
            return await super().put(session, before)

    async def remove_bound(self, bound: bytes) -> int:
        async with _slowly(*self._removing):
            return await super().remove_bound(bound)


@asynccontextmanager
async def _slowly(before: int, after: int) -> AsyncIterator[None]:
    await _turn(before)
    yield
    await _turn(after)


async def _turn(times: int) -> None:
    for _ in range(times):
        await asyncio.sleep(0)


TURNS = st.tuples(st.integers(0, 6), st.integers(0, 2))


@settings(max_examples=200)
@given(
    starts=st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 3), st.booleans()), min_size=1, max_size=4),
    turns=st.tuples(TURNS, TURNS, TURNS),
    closes_after=st.integers(0, 12),
    cancels=st.booleans(),
)
def test_no_order_of_events_leaves_a_session_without_its_connection(
    starts: list[tuple[str, int, bool]], turns: tuple[tuple[int, int], ...], closes_after: int, cancels: bool
) -> None:
    async def run() -> None:
        ended: list[str] = []
        async with replicas(Slow(turns), count=ended.append) as (sessions,):
            await sessions.advance(ask("free", start=True, model="m", version=1))
            connection = asyncio.get_running_loop().create_future()

            async def start(name: str, after: int, steps: bool) -> None:
                await _turn(after)
                values = random_values(2) if steps else None
                await sessions.advance(ask(name, values, start=True, model="m", version=1, connection=connection))

            calls = [asyncio.create_task(start(*each)) for each in starts]
            await _turn(closes_after)
            connection.set_result(None)
            if cancels:
                # As the transport does, in a later turn.
                await asyncio.sleep(0)
                for call in calls:
                    call.cancel()
            await asyncio.gather(*calls, return_exceptions=True)
            while others := asyncio.all_tasks() - {asyncio.current_task()}:
                await asyncio.wait(others)
            assert [each.session_id for each in await sessions.list()] == ["free"]
            assert ended.count("disconnected") <= len(starts)
            for name in "ab":
                with pytest.raises(SessionNotFoundError):
                    await sessions.advance(ask(name, random_values(1)))

    asyncio.run(run())


async def test_sessions_end_with_the_server_and_when_they_are_started_anew_only_with_the_last_connection() -> None:
    store = MemoryStore(60, 100)
    counted: list[str] = []
    async with replicas(store, count=counted.append) as (sessions,):
        loop = asyncio.get_running_loop()
        first, second = loop.create_future(), loop.create_future()
        for connection in (first, second):
            start = ask("s", random_values(2), start=True, model="m", version=1, connection=connection)
            await sessions.advance(start)
        done = await sessions.advance(ask("s", random_values(1), first_step=2))
        first.set_result(None)
        await _turn(5)
        assert (await sessions.advance(ask("s", random_values(1), first_step=3))).step == done.step + 1
        assert counted.count("disconnected") == 0
        # An end is not a disconnection, and can be repeated without the connection.
        end = ask("s", random_values(1), first_step=4, end=True)
        await sessions.advance(end)
        second.set_result(None)
        await _turn(5)
        assert (await sessions.advance(end)).step == 5
        third = loop.create_future()
        await sessions.advance(ask("t", start=True, model="m", version=1, connection=third))
        assert await store.count(MODEL.spec.key, MODEL.spec.bundle) == 1
        assert counted.count("disconnected") == 0
        await sessions.close()
    assert counted.count("disconnected") == 1
