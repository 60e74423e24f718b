"""Quotas of identities: counted over all workers that share a folder, whichever of them dies."""

from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.operators import write_identities

from unroll_engine.errors import OverloadedError
from unroll_server.identity.quotas import Quotas
from unroll_server.identity.tokens import Identities


@pytest.fixture(scope="module")
def identities(tmp_path_factory: pytest.TempPathFactory) -> Identities:
    path = tmp_path_factory.mktemp("identities") / "identities.toml"
    alice = {"max_concurrent_calls": 2, "max_open_sequences": 0, "max_sessions": 3, "max_queued_steps": 4}
    return Identities(write_identities(path, alice=alice, bob={}))


@given(st.lists(st.booleans()))
def test_calls_are_refused_exactly_when_the_quota_is_used_up(identities: Identities, opening: list[bool]) -> None:
    quotas, calls = Quotas(identities), 0
    for opens in opening:
        if not opens:
            if calls:
                quotas.close_call("alice")
                calls -= 1
        elif calls < 2:
            quotas.open_call("alice")
            calls += 1
        else:
            with pytest.raises(OverloadedError) as raised:
                quotas.open_call("alice")
            assert raised.value.reason == "IDENTITY_LIMIT"


def test_quotas_span_all_workers_and_a_dead_worker_uses_nothing(identities: Identities, tmp_path: Path) -> None:
    first, second = (Quotas(identities, tmp_path / "quotas", number, 2) for number in range(2))
    first.open_call("alice")
    second.open_call("alice")
    for quotas in (first, second):
        with pytest.raises(OverloadedError, match=r"^alice may have at most 2 calls in flight at once$"):
            quotas.open_call("alice")
    # It died, and its replacement has its number.
    first = Quotas(identities, tmp_path / "quotas", 0, 2)
    first.open_call("alice")
    with pytest.raises(OverloadedError):
        second.open_call("alice")
    second.close_call("alice")
    first.open_call("alice")


def test_each_kind_of_use_and_each_identity_has_a_count_of_its_own(identities: Identities) -> None:
    quotas = Quotas(identities)
    with pytest.raises(OverloadedError, match=r"^alice may have at most 0 open sequences at once$"):
        quotas.open_sequence("alice")
    for _ in range(1000):
        quotas.open_sequence("bob")
        quotas.open_call("")
        quotas.close_call("")
        quotas.open_sequence("")
        quotas.close_sequence("")
    quotas.close_sequence("bob")
    quotas.open_call("alice")


async def test_sessions_are_counted_by_their_store_if_there_is_a_quota(identities: Identities) -> None:
    quotas, counted = Quotas(identities), 0

    def kept(sessions: int) -> Callable[[], Awaitable[int]]:
        async def count() -> int:
            nonlocal counted
            counted += 1
            return sessions

        return count

    await quotas.check_sessions("alice", kept(2))
    with pytest.raises(OverloadedError, match=r"^alice may have at most 3 sessions at once$"):
        await quotas.check_sessions("alice", kept(3))
    assert counted == 2
    await quotas.check_sessions("bob", kept(10**6))
    await quotas.check_sessions("", kept(10**6))
    assert counted == 2


def test_the_engine_learns_the_quota_of_queued_steps(identities: Identities) -> None:
    quotas = Quotas(identities)
    assert [quotas.queued_steps(name) for name in ("alice", "bob", "")] == [4, None, None]
