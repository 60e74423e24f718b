"""Coalescing with faults: a bad call fails alone, and each caller has its own deadline and cancellation."""

import asyncio
import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from support.models import alone, random_network, served
from support.values import random_values
from support.waiting import until
from unit.client.gated import Gated, labels_of
from unit.client.harness import MODEL, LocalServer

from unroll_client import (
    AsyncClient,
    Classification,
    DeadlineExceeded,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    Snapshot,
    Unavailable,
    UnrollError,
)
from unroll_proto.v1.unroll_pb2_grpc import UnrollServiceServicer
from unroll_server.config import Limits

Script = Callable[[UnrollServiceServicer], str]
ROOMY = Limits(max_sequences=64, max_steps=100, max_open_sequences=100, max_message_bytes=1 << 20)


async def outcomes(calls: list[Any]) -> list[Any]:
    return await asyncio.gather(*calls, return_exceptions=True)


def fields_of(error: UnrollError) -> list[str]:
    return [field.field for field in error.fields]


def assert_bits(result: Classification, values: NDArray[np.float32]) -> None:
    assert result.logits[0].tobytes() == alone(MODEL, values, None)[0][-1].tobytes()


# States that only the server refuses: of another model, truncated, or of another format.
SPOILT: dict[str, tuple[dict[str, Any], type[UnrollError], str]] = {
    "another's": ({"model": "other"}, FailedPrecondition, "initial_states[1]"),
    "cut off": ({"data": (bytes(4),)}, InvalidArgument, "initial_states[1].state[0]"),
    "not finite": ({"data": (np.full(8, np.nan, "<f4").tobytes(),)}, InvalidArgument, "initial_states[1].state[0]"),
}


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from([None, None, None, *SPOILT]), min_size=1, max_size=30))
async def test_bad_ones_fail_alone_and_by_their_own_index(address: str, kinds: list[str | None]) -> None:
    good = Snapshot("m", 1, "simple_rnn", 0, (bytes(4 * 8),))
    sequences = [random_values(1 + index, index) for index in range(len(kinds))]
    async with AsyncClient(address, model="m") as client:
        results = await outcomes(
            [
                client.classify(
                    [sequence, sequence],
                    initial_states=[good, dataclasses.replace(good, **(SPOILT[kind][0] if kind else {}))],
                )
                for sequence, kind in zip(sequences, kinds, strict=True)
            ]
        )
    for sequence, kind, result in zip(sequences, kinds, results, strict=True):
        if kind is None:
            assert_bits(result, sequence)
        else:
            _, error, field = SPOILT[kind]
            assert type(result) is error
            assert fields_of(result) == [field]
            assert result.message.startswith(f"{field}: ")


async def test_one_bad_one_costs_three_requests_more(start: Callable[..., LocalServer]) -> None:
    server = start(MODEL, limits=ROOMY)
    good = Snapshot("m", 1, "simple_rnn", 0, (bytes(4 * 8),))
    states = [dataclasses.replace(good, model="other") if index == 33 else good for index in range(60)]
    async with AsyncClient(server.address) as client:
        results = await outcomes([client.classify([random_values(3)], initial_states=[one]) for one in states])
    assert [index for index, result in enumerate(results) if isinstance(result, Exception)] == [33]
    # The one that was refused, the bad one alone, and the others in halves.
    assert server.calls["Classify"] == 4


@pytest.mark.parametrize(
    ("change", "refused", "field", "words"),
    [
        ({"max_steps": 20}, InvalidArgument, ["lengths[1]"], "90 timesteps, 1 to 20 allowed"),
        ({"max_message_bytes": 1000}, ResourceExhausted, [], "larger than max"),
        ({"max_sequences": 2}, None, [], ""),
    ],
)
async def test_a_server_that_came_back_with_other_limits(
    start: Callable[..., LocalServer],
    change: dict[str, int],
    refused: type[UnrollError] | None,
    field: list[str],
    words: str,
) -> None:
    first = start(MODEL, limits=ROOMY)
    lengths = [5, 90, 6, 7, 90, 8, 9, 10]
    sequences = [random_values(length, index) for index, length in enumerate(lengths)]
    async with AsyncClient(first.address, wait_for_ready=True) as client:
        await client.classify(sequences[:1])
        first.stop()
        second = start(MODEL, limits=dataclasses.replace(ROOMY, **change), port=first.port)
        results = await outcomes([client.classify([sequences[0], sequence]) for sequence in sequences])
        assert second.calls["Classify"] > 1
        # The new limits are known now, so the next calls are within them.
        second.calls.clear()
        await asyncio.gather(*(client.classify([sequences[0], sequences[2]]) for _ in range(4)))
        assert second.calls["GetModel"] <= 1
        assert second.calls["Classify"] == (
            4 if "max_sequences" in change else 2 if "max_message_bytes" in change else 1
        )
        for length, sequence, result in zip(lengths, sequences, results, strict=True):
            if refused and length == 90:
                assert type(result) is refused
                assert fields_of(result) == field
                assert words in result.message
            else:
                assert result.logits[1].tobytes() == alone(MODEL, sequence, None)[0][-1].tobytes()


async def test_features_that_add_up_to_another_number_do_not_meet(address: str) -> None:
    # Concatenated, 2 and 4 features have as many values as two sequences of 3.
    async with AsyncClient(address, model="m") as client:
        await client.model()
        values = random_values(5)
        results = await outcomes([client.classify([random_values(5, features=features)]) for features in (2, 4, 2, 4)])
        good = await client.classify([values])
        with pytest.raises(InvalidArgument) as alone_refused:
            await client.classify([random_values(5, features=2)])
    assert_bits(good, values)
    for result in results:
        assert type(result) is InvalidArgument
        assert fields_of(result) == ["sequences[0]"]
    # The message is that of a separate call, with its own sizes.
    assert results[0].message == results[2].message == alone_refused.value.message


async def test_one_that_cannot_be_sent_fails_alone(address: str) -> None:
    bad = [np.full((2, 3), np.nan), np.ones((2, 4)), np.ones(3)]
    async with AsyncClient(address, model="m") as client:
        values = random_values(5)
        results = await outcomes([client.classify([values, other]) for other in [values, *bad, values]])
    for result in results[1:-1]:
        assert fields_of(result) == ["sequences[1]"]
    for result in (results[0], results[-1]):
        assert_bits(result, values)


async def test_what_is_every_call_s_fault_is_every_call_s_error(start: Callable[..., LocalServer]) -> None:
    server = start(MODEL, limits=ROOMY)
    async with AsyncClient(server.address, wait_for_ready=True) as client:
        await client.classify([random_values(3)], model="m")
        server.stop()
        other = start(served(random_network(), "n"), limits=ROOMY, port=server.port)
        results = await outcomes([client.classify([random_values(3)], model="m") for _ in range(30)])
    assert other.calls["Classify"] == 1
    assert {type(result) for result in results} == {NotFound}
    # Each has its own exception, with its own traceback.
    assert len({id(result) for result in results}) == 30


async def test_no_server_is_unavailable_to_all(start: Callable[..., LocalServer]) -> None:
    server = start(MODEL)
    async with AsyncClient(server.address) as client:
        await client.model()
        server.stop()
        results = await outcomes([client.classify([random_values(3)]) for _ in range(30)])
    assert {type(result) for result in results} == {Unavailable}


async def test_a_deadline_is_the_caller_s_own(script: Script) -> None:
    servicer = Gated()
    async with AsyncClient(script(servicer)) as client:
        await client.model()
        patient = asyncio.create_task(client.classify([random_values(2)], timeout=90))
        hasty = asyncio.create_task(client.classify([random_values(3)], timeout=0.5))
        with pytest.raises(DeadlineExceeded) as shared:
            await hasty
        servicer.gate.set()
        assert labels_of(await patient) == ["2 steps"]
        # It ended like a call that shares nothing.
        servicer.gate.clear()
        with pytest.raises(DeadlineExceeded) as lone:
            await client.classify([random_values(3)] * 2000, timeout=0.1)
        assert (shared.value.message, shared.value.code) == (lone.value.message, lone.value.code)
    assert list(servicer.requests[0].lengths) == [2, 3]
    # The request's deadline is their latest, rounded up in transit.
    assert servicer.remaining[0] is not None
    assert 50 < servicer.remaining[0] < 91


async def test_one_without_a_deadline_makes_a_request_without(script: Script) -> None:
    servicer = Gated()
    servicer.gate.set()
    async with AsyncClient(script(servicer)) as client:
        await asyncio.gather(
            *(client.classify([random_values(2)], timeout=seconds) for seconds in (10, float("inf"), 20))
        )
    assert servicer.remaining == [None]


async def test_a_deadline_passes_while_the_call_waits_to_be_sent(script: Script) -> None:
    servicer = Gated()
    async with AsyncClient(script(servicer)) as client:
        first = [asyncio.create_task(client.classify([random_values(2)])) for _ in range(1)]
        await servicer.until(1)
        first.append(asyncio.create_task(client.classify([random_values(2)])))
        await servicer.until(2)
        with pytest.raises(DeadlineExceeded):
            await client.classify([random_values(3)], timeout=0.1)
        with pytest.raises(DeadlineExceeded):
            await client.classify([random_values(3)], timeout=0)
        servicer.gate.set()
        await asyncio.gather(*first)
        await client.classify([random_values(4)])
    # Calls without time left were never sent.
    assert [list(request.lengths) for request in servicer.requests] == [[2], [2], [4]]


async def test_the_lookup_of_the_model_is_shared_and_nobody_s_own(script: Script) -> None:
    servicer = Gated()
    servicer.gate.set()
    servicer.model_gate.clear()
    async with AsyncClient(script(servicer)) as client:
        # Long enough for its lookup to arrive on a busy machine.
        hasty = asyncio.create_task(client.classify([random_values(2)], timeout=1))
        gone = asyncio.create_task(client.classify([random_values(2)]))
        patient = [asyncio.create_task(client.classify([random_values(2)])) for _ in range(20)]
        with pytest.raises(DeadlineExceeded):
            await hasty
        gone.cancel()
        with pytest.raises(asyncio.CancelledError):
            await gone
        # The hasty call's lookup ends with its deadline; the others start another one.
        await until(lambda: servicer.lookups == 2)
        servicer.model_gate.set()
        assert len(await asyncio.gather(*patient)) == 20
    assert servicer.lookups == 2


async def test_a_cancelled_call_is_dropped_or_ignored(script: Script) -> None:
    servicer = Gated()
    async with AsyncClient(script(servicer)) as client:
        sent = [asyncio.create_task(client.classify([random_values(2)])) for _ in range(3)]
        await servicer.until(1)
        other = asyncio.create_task(client.classify([random_values(3)]))
        await servicer.until(2)
        waiting = [asyncio.create_task(client.classify([random_values(4 + index)])) for index in range(3)]
        await asyncio.sleep(0)
        sent[1].cancel()
        waiting[1].cancel()
        assert [type(each) for each in await outcomes([sent[1], waiting[1]])] == [asyncio.CancelledError] * 2
        servicer.gate.set()
        answered = await asyncio.gather(sent[0], sent[2], other, waiting[0], waiting[2])
    assert [labels_of(result)[0] for result in answered] == ["2 steps", "2 steps", "3 steps", "4 steps", "6 steps"]
    assert [list(request.lengths) for request in servicer.requests] == [[2, 2, 2], [3], [4, 6]]
    assert not servicer.cancelled


@pytest.mark.parametrize("how", ["cancelled", "expired"])
async def test_when_all_have_gone_so_has_the_request(script: Script, how: str) -> None:
    servicer = Gated()
    # Long enough for the request to arrive on a busy machine.
    timeout = 1 if how == "expired" else 30
    async with AsyncClient(script(servicer)) as client:
        await client.model()
        gone = [asyncio.create_task(client.classify([random_values(2)], timeout=timeout)) for _ in range(3)]
        await servicer.until(1)
        if how == "cancelled":
            for task in gone:
                task.cancel()
        kinds = {type(each) for each in await outcomes(gone)}
        assert kinds == {asyncio.CancelledError if how == "cancelled" else DeadlineExceeded}
        await servicer.until_cancelled(1)
        servicer.gate.set()
        assert labels_of(await client.classify([random_values(5)])) == ["5 steps"]


async def test_closing_fails_what_was_sent_and_what_waits(script: Script) -> None:
    servicer = Gated()
    client = AsyncClient(script(servicer))
    first = asyncio.create_task(client.classify([random_values(2)]))
    await servicer.until(1)
    second = asyncio.create_task(client.classify([random_values(2)]))
    await servicer.until(2)
    waiting = [asyncio.create_task(client.classify([random_values(2)])) for _ in range(5)]
    await asyncio.sleep(0)
    await client.close()
    results = await outcomes([first, second, *waiting])
    assert [(type(each), each.message) for each in results] == [(Unavailable, "the client was closed")] * 7
    await servicer.until_cancelled(2)
    assert len(servicer.requests) == 2
    with pytest.raises(RuntimeError, match="the client is closed"):
        await client.classify([random_values(2)])
    assert len(asyncio.all_tasks()) == 1


async def test_a_full_server_is_asked_again_by_those_who_can_wait(script: Script) -> None:
    servicer = Gated(pushbacks=1, retry_after=1.5)
    servicer.gate.set()
    async with AsyncClient(script(servicer)) as client:
        await client.model()
        timeouts = (30, 1.4, 30, 1.4, float("inf"))
        results = await outcomes([client.classify([random_values(2)], timeout=each) for each in timeouts])
    assert [type(each) is ResourceExhausted for each in results] == [False, True, False, True, False]
    assert results[1].retry_after == 1.5
    assert [len(request.lengths) for request in servicer.requests] == [5, 2, 1]


async def test_requests_that_never_fit_together_get_through(start: Callable[..., LocalServer]) -> None:
    # The server's queue has room for 3 of the 40 calls of 30 steps at a time.
    server = start(MODEL, limits=ROOMY, queued=100)
    sequences = [random_values(30, seed) for seed in range(40)]
    async with AsyncClient(server.address, timeout=120) as client:
        results = await asyncio.gather(*(client.classify([sequence]) for sequence in sequences))
    for sequence, result in zip(sequences, results, strict=True):
        assert_bits(result, sequence)
