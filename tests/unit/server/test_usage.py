"""What identities have in use: counted over workers that share a folder, whoever dies among them."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.operators import write_identities

from unroll_engine.errors import OverloadedError
from unroll_server.identity.quotas import CALLS, OPEN_SEQUENCES, Usage
from unroll_server.identity.tokens import Identities


@pytest.fixture(scope="module")
def identities(tmp_path_factory: pytest.TempPathFactory) -> Identities:
    path = tmp_path_factory.mktemp("identities") / "identities.toml"
    return Identities(write_identities(path, alice={"max_concurrent_calls": 2, "max_open_sequences": 0}, bob={}))


@given(st.lists(st.booleans()))
def test_there_are_never_more_than_the_limit_and_never_fewer_than_taken(
    identities: Identities, taking: list[bool]
) -> None:
    usage, held = Usage(identities), 0
    for take in taking:
        if not take:
            if held:
                usage.give(CALLS, "alice")
                held -= 1
        elif held < 2:
            usage.take(CALLS, "alice")
            held += 1
        else:
            with pytest.raises(OverloadedError) as raised:
                usage.take(CALLS, "alice")
            assert raised.value.reason == "IDENTITY_LIMIT"


def test_limits_hold_over_all_workers_and_a_dead_worker_holds_nothing(identities: Identities, tmp_path: Path) -> None:
    first, second = (Usage(identities, tmp_path / "usage", number, 2) for number in range(2))
    first.take(CALLS, "alice")
    second.take(CALLS, "alice")
    for usage in (first, second):
        with pytest.raises(OverloadedError, match="alice has 2 calls in flight and may have 2"):
            usage.take(CALLS, "alice")
    # It died, and another has its number.
    first = Usage(identities, tmp_path / "usage", 0, 2)
    first.take(CALLS, "alice")
    with pytest.raises(OverloadedError):
        second.take(CALLS, "alice")
    second.give(CALLS, "alice")
    first.take(CALLS, "alice")


def test_kinds_and_identities_do_not_mix(identities: Identities) -> None:
    usage = Usage(identities)
    with pytest.raises(OverloadedError, match="0 sequences open and may have 0"):
        usage.take(OPEN_SEQUENCES, "alice")
    for _ in range(1000):
        usage.take(OPEN_SEQUENCES, "bob")
        usage.take(CALLS, "")
        usage.give(CALLS, "")
    usage.take(CALLS, "alice")
