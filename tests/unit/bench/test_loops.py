"""The loops against real servers that are slow, wrong, refusing, ending or dead, and their figures."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.waiting import until

from unroll_bench.load import Call, Result, Tally, closed_loop, open_loop, running
from unroll_bench.load.lengths import Lengths

Handler = Callable[[bytes, Any], Awaitable[bytes]]


@asynccontextmanager
async def serving(handler: Handler, port: int = 0, **options: Any) -> AsyncIterator[tuple[str, grpc.aio.Server]]:
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0), *options.items()])
    handlers: dict[str, Any] = {"Do": grpc.unary_unary_rpc_method_handler(handler)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("t.T", handlers),))
    port = server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    try:
        yield f"127.0.0.1:{port}", server
    finally:
        await server.stop(None)


async def echo(request: bytes, context: Any) -> bytes:
    return request


def calls(*messages: bytes) -> list[Call]:
    return [Call("/t.T/Do", message, message.__eq__) for message in messages]


async def test_closed_loop_keeps_its_number_in_flight() -> None:
    most = now = 0
    all_here = asyncio.Event()
    seen: Counter[bytes] = Counter()

    async def count(request: bytes, context: Any) -> bytes:
        nonlocal most, now
        now += 1
        most = max(most, now)
        seen[request] += 1
        # On a busy machine, some calls would be answered before the last ones arrive.
        if now == 7:
            all_here.set()
        await all_here.wait()
        await asyncio.sleep(0.001)
        now -= 1
        return request

    async with serving(count) as (address, _):
        result = await closed_loop(
            address, calls(b"a", b"bb", b""), in_flight=7, seconds=0.4, warm_up=0.1, connections=3
        )
    assert most == 7
    assert not result.errors
    assert result.wrong == 0
    assert result.calls == len(result.latencies) > 0
    assert result.seconds == 0.4
    assert result.rate == pytest.approx(result.calls / 0.4)
    assert result.latencies.min() >= 0.001
    # In turn, so that all messages are sent about equally often, the unmeasured ones included.
    assert set(seen) == {b"a", b"bb", b""}
    assert max(seen.values()) - min(seen.values()) <= 7
    assert seen.total() > result.calls


async def test_wrong_answers_and_errors_are_counted() -> None:
    number = 0

    async def third(request: bytes, context: Any) -> bytes:
        nonlocal number
        number += 1
        if number % 3 == 1:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "full")
        return request if number % 3 else b"wrong"

    async with serving(third) as (address, _):
        result = await closed_loop(address, calls(b"right"), in_flight=1, seconds=0.3, warm_up=0)
    refused = result.errors.pop("RESOURCE_EXHAUSTED: full")
    assert not result.errors
    assert abs(result.wrong - refused) <= 1
    assert abs(result.calls - refused - result.wrong) <= 2
    assert abs(refused - number / 3) <= 1


async def test_check_that_raises_is_an_error() -> None:
    def check(answer: bytes) -> bool:
        raise KeyError("oops")

    async with serving(echo) as (address, _):
        result = await closed_loop(address, [Call("/t.T/Do", b"", check)], in_flight=1, seconds=0.2, warm_up=0)
    assert result.calls > 0
    assert list(result.errors) == ["the check failed: KeyError('oops')"]


async def test_open_loop_keeps_its_schedule() -> None:
    """Answers that take 100 ms do not delay later calls."""
    arrived: list[float] = []

    async def slow(request: bytes, context: Any) -> bytes:
        arrived.append(asyncio.get_running_loop().time())
        await asyncio.sleep(0.1)
        return request

    async with serving(slow) as (address, _):
        result = await open_loop(address, calls(b"a"), rate=200, seconds=1, warm_up=0.2, seed=3, max_in_flight=10_000)
        again = await open_loop(address, calls(b"a"), rate=200, seconds=1, warm_up=0.2, seed=3, max_in_flight=10_000)
    assert not result.errors
    assert 150 < result.calls < 250
    assert again.calls == result.calls  # the same seed, the same arrivals
    assert result.latencies.min() >= 0.1
    assert result.percentile(50) >= 0.1
    gaps = np.diff(arrived[: result.calls])
    assert gaps.std() > gaps.mean() / 2  # exponential gaps spread as wide as they are long


async def test_open_loop_counts_waiting_and_what_was_not_sent() -> None:
    """Two at a time of 50 ms each are 40 per second; 400 per second arrive."""

    async def slow(request: bytes, context: Any) -> bytes:
        await asyncio.sleep(0.05)
        return request

    async with serving(slow) as (address, _):
        result = await open_loop(address, calls(b"a"), rate=400, seconds=1, warm_up=0, max_in_flight=2)
    unsent = result.errors.pop("not sent")
    assert not result.errors
    assert 0 < result.calls <= 42
    assert 340 < unsent + result.calls < 460
    # The last one sent had waited for nearly the whole run.
    assert result.latencies.max() > 0.5
    assert result.rate <= 42


async def test_server_that_ends_and_comes_back() -> None:
    """Losses are counted, and the run continues."""
    tally = Tally()
    async with serving(echo) as (address, server):
        run = asyncio.ensure_future(closed_loop(address, calls(b"a"), in_flight=4, seconds=30, warm_up=0, tally=tally))
        await until(lambda: len(tally.latencies) > 20)
        await server.stop(None)
        await until(lambda: any(reason.startswith("connect: ") for reason in tally.errors))
        count = len(tally.latencies)
        async with serving(echo, int(address.rpartition(":")[2])):
            await until(lambda: len(tally.latencies) > count + 20)
            assert tally.in_flight == 4
            run.cancel()
            with pytest.raises(asyncio.CancelledError):
                await run


async def test_connections_that_must_be_renewed_lose_nothing() -> None:
    async with serving(echo, **{"grpc.max_connection_age_ms": 50}) as (address, _):
        result = await closed_loop(address, calls(b"a"), in_flight=8, seconds=1, connections=2)
    assert not result.errors
    assert result.calls > 0


async def test_unanswered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "PATIENCE", 0.2)
    forever = asyncio.Event()

    async def never(request: bytes, context: Any) -> bytes:
        await forever.wait()
        return request

    async with serving(never) as (address, _):
        result = await closed_loop(address, calls(b"a"), in_flight=3, seconds=0.1, warm_up=0)
        forever.set()
    assert result.errors == {"unanswered": 3}
    assert result.calls == 0
    assert np.isnan(result.percentile(99))


async def test_no_server_is_said_at_once() -> None:
    with pytest.raises(ConnectionRefusedError):
        await closed_loop("127.0.0.1:1", calls(b""), in_flight=1, seconds=1)


@pytest.mark.parametrize("bad", [{"in_flight": 0}, {"seconds": 0}, {"connections": 0}])
async def test_arguments(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(bad))}"):
        await closed_loop("127.0.0.1:1", calls(b""), **{"in_flight": 1, "seconds": 1, **bad})
    with pytest.raises(ValueError, match="calls"):
        await closed_loop("127.0.0.1:1", [], in_flight=1, seconds=1)


def test_percentiles_are_latencies_that_were_seen() -> None:
    result = Result(np.arange(1.0, 101.0), 1.0, 100, Counter(), 0)
    assert [result.percentile(q) for q in (0, 50, 99, 100)] == [1.0, 51.0, 100.0, 100.0]


@given(least=st.integers(1, 500), more=st.integers(0, 500), seed=st.integers(0, 99))
def test_lengths_are_drawn_between_their_bounds(least: int, more: int, seed: int) -> None:
    lengths = Lengths.parse(f"{least}..{least + more}")
    drawn = lengths.draw(np.random.default_rng(seed), 200)
    assert least <= drawn.min() <= drawn.max() <= least + more == lengths.most
    assert Lengths.parse(str(least)).draw(np.random.default_rng(seed), 3).tolist() == [least] * 3


@pytest.mark.parametrize("text", ["", "0", "0..3", "5..4", "a", "-3", "1.5", "1..2..3"])
def test_bad_lengths(text: str) -> None:
    with pytest.raises(ValueError, match="expected"):
        Lengths.parse(text)
