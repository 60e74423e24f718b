"""unroll: chunks in order over one shared stream, errors of single sequences, reported ends."""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from support.models import alone
from support.values import Float32Array, cut, random_values
from unit.client.harness import LIMITS, MODEL, TWO_LAYERS, LocalServer

from unroll_client import (
    AsyncClient,
    AsyncSequence,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    ServerDraining,
    Snapshot,
    Steps,
    Unavailable,
)


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=8),
    st.integers(1, 9),
    st.booleans(),
    st.booleans(),
    st.sampled_from([MODEL, TWO_LAYERS]),
)
async def test_however_it_is_cut_and_pipelined_the_bits_are_the_same(
    address: str, sizes: list[int], every: int, states: bool, logits: bool, model: Any
) -> None:
    values = random_values(sum(sizes))
    expected_logits, expected_states, (final,) = alone(model, values, None)
    name = model.spec.key.name
    async with (
        AsyncClient(address) as client,
        client.unroll(name, states=states, logits=logits, every=every) as sequence,
    ):
        assert (sequence.model, sequence.version, sequence.step) == (name, 1, 0)
        answers = await asyncio.gather(*(sequence.send(chunk) for chunk in cut(values, sizes)))
        snapshot = await sequence.snapshot()
        assert sequence.step == len(values)
    reported = np.arange(every - 1, len(values), every)
    assert np.concatenate([answer.steps for answer in answers]).tolist() == reported.tolist()
    assert [answer.count for answer in answers] == sizes
    assert [answer.first_step for answer in answers] == [0, *np.cumsum(sizes)[:-1]]
    for answer in answers:
        assert (answer.states is not None, answer.logits is not None) == (states, logits)
        if answer.states is not None:
            assert answer.states.tobytes() == expected_states[answer.steps].tobytes()
        if answer.logits is not None:
            assert answer.logits.tobytes() == expected_logits[answer.steps].tobytes()
    assert (snapshot.step, snapshot.model, snapshot.version) == (len(values), name, 1)
    assert snapshot.state[0].shape == final.shape
    assert snapshot.state[0].tobytes() == final.tobytes()


async def test_a_chunk_over_the_limits_goes_as_several(address: str) -> None:
    values = random_values(LIMITS.max_steps * 3 + 5)
    _, expected, _ = alone(MODEL, values, None)
    async with AsyncClient(address, model="m") as client, client.unroll() as sequence:
        answer = await sequence.send(values)
    assert (answer.first_step, answer.count, len(answer)) == (0, len(values), len(values))
    assert answer.states is not None
    assert answer.states.tobytes() == expected.tobytes()


async def test_steps_come_as_they_are_computed(address: str) -> None:
    values = random_values(50)
    _, expected, _ = alone(MODEL, values, None)
    async with AsyncClient(address, model="m") as client, client.unroll() as sequence:
        parts = [part async for part in sequence.stream(values)]
        # Leaving the loop early drops only the rest of the answer.
        async for part in sequence.stream(values):
            assert part.first_step == 50
            break
        last = await sequence.send(values[:1])
    assert len(parts) > 1
    assert [part.first_step for part in parts] == np.cumsum([0, *(part.count for part in parts[:-1])]).tolist()
    assert np.concatenate([states_of(part) for part in parts]).tobytes() == expected.tobytes()
    assert last.first_step == 100


async def send_for_ever(sequence: AsyncSequence, values: NDArray[Any]) -> None:
    while True:
        await sequence.send(values)


async def fail_within(sequence: AsyncSequence) -> None:
    async with sequence:
        await sequence.send(random_values(1))
        raise ZeroDivisionError


def states_of(steps: Steps) -> Float32Array:
    assert steps.states is not None
    return steps.states


async def test_a_fork_and_a_resumed_sequence_have_the_same_bits(address: str) -> None:
    values = random_values(30)
    _, expected, _ = alone(TWO_LAYERS, values, None)
    async with AsyncClient(address, model="m") as client:
        async with client.unroll("deep") as sequence:
            await sequence.send(values[:10])
            snapshot = await sequence.snapshot()
            await sequence.send(values[10:])
            closed = await sequence.close()
            assert await sequence.close() == closed
            with pytest.raises(FailedPrecondition, match="closed"):
                await sequence.send(values)
        # The default model is the snapshot's, and a snapshot is plain bytes.
        async with client.unroll(snapshot=Snapshot.from_bytes(snapshot.to_bytes())) as fork:
            assert (fork.model, fork.step) == ("deep", 10)
            answer = await fork.send(values[10:])
            assert await fork.snapshot() == closed
    assert answer.first_step == 10
    assert states_of(answer).tobytes() == expected[10:].tobytes()


async def test_chunks_of_many_sequences_travel_together(start: Callable[..., LocalServer]) -> None:
    """Snapshots, refusals and chunks over the limits among them; each has its own bits, in its own order."""
    server, count = start(MODEL), 60
    values = [random_values(200, seed) for seed in range(count)]
    bad = np.full((1, 3), np.nan, np.float32)
    async with AsyncClient(server.address, model="m") as client:
        sequences = await asyncio.gather(*(client.unroll().open() for _ in values))
        parts: list[list[Steps]] = [[] for _ in values]
        for begin, end in [(0, 1), (1, 3), (3, 120), (120, 200)]:
            sent = [
                sequence.send(own[begin:end]) if index % 5 or begin != 1 else sequence.send(bad)
                for index, (sequence, own) in enumerate(zip(sequences, values, strict=True))
            ]
            for index, answer in enumerate(await asyncio.gather(*sent, return_exceptions=True)):
                if isinstance(answer, InvalidArgument):
                    assert index % 5 == 0
                    assert begin == 1
                    answer = await sequences[index].send(values[index][begin:end])
                assert isinstance(answer, Steps)
                parts[index].append(answer)
        closed = await asyncio.gather(*(sequence.close() for sequence in sequences))
    for own, answers, snapshot in zip(values, parts, closed, strict=True):
        _, expected, (final,) = alone(MODEL, own, None)
        assert np.concatenate([states_of(answer) for answer in answers]).tobytes() == expected.tobytes()
        assert snapshot.state[0].tobytes() == final.tobytes()
    assert server.messages["chunks"] >= 4
    assert server.messages["chunk"] < count


async def test_many_sequences_share_one_call(start: Callable[..., LocalServer]) -> None:
    async def one(client: AsyncClient, seed: int) -> None:
        values = random_values(40, seed)
        _, expected, _ = alone(MODEL, values, None)
        async with client.unroll("m") as sequence:
            answers = [await sequence.send(chunk) for chunk in cut(values, [3, 1, 20])]
        assert np.concatenate([states_of(answer) for answer in answers]).tobytes() == expected.tobytes()

    server = start(MODEL)
    async with AsyncClient(server.address) as client:
        await asyncio.gather(*(one(client, seed) for seed in range(60)))
    assert server.calls["Unroll"] == 1


async def test_a_refused_opening_is_an_error_of_that_sequence_alone(address: str) -> None:
    async with AsyncClient(address, model="m") as client, client.unroll() as sequence:
        with pytest.raises(NotFound):
            await client.unroll("nosuch").open()
        with pytest.raises(FailedPrecondition, match="m/1"):
            await client.unroll("deep", snapshot=await sequence.snapshot()).open()
        with pytest.raises(InvalidArgument, match="every"):
            client.unroll(every=0)
        assert (await sequence.send(random_values(3))).count == 3


async def test_a_bad_chunk_consumes_nothing(address: str) -> None:
    async with AsyncClient(address, model="m") as client, client.unroll() as sequence:
        for bad in (np.ones((2, 4)), np.ones(3), np.ones((0, 3)), np.full((2, 3), np.nan)):
            with pytest.raises(InvalidArgument, match="chunk"):
                await sequence.send(bad)
        assert sequence.step == 0
        assert (await sequence.send(random_values(2))).first_step == 0


async def test_a_chunk_that_the_server_refuses_can_be_sent_again(start: Callable[..., LocalServer]) -> None:
    values = random_values(100)
    _, expected, _ = alone(MODEL, values, None)
    generous = start(MODEL, limits=replace(LIMITS, max_steps=1000))
    async with AsyncClient(generous.address, model="m") as client, client.unroll() as sequence:
        first = await sequence.send(values[:8])
        generous.stop()
        start(MODEL, port=generous.port)
        # A chunk within the limits that the client knows is over those of the new server.
        # The two behind it leave a gap.
        pipelined = (values[8:90], values[90:95], values[95:])
        refused = await asyncio.gather(*map(sequence.send, pipelined), return_exceptions=True)
        kinds = [InvalidArgument, FailedPrecondition, FailedPrecondition]
        assert [type(error) for error in refused] == kinds
        assert sequence.step == 8
        rest = [await sequence.send(values[start : start + 23]) for start in range(8, 100, 23)]
    assert np.concatenate([states_of(part) for part in [first, *rest]]).tobytes() == expected.tobytes()


async def test_a_draining_server_gives_the_sequence_back(start: Callable[..., LocalServer], address: str) -> None:
    server = start(MODEL)
    values = np.concatenate([random_values(12), np.ones((2000, 3), np.float32)])
    _, expected, _ = alone(MODEL, values, None)
    async with AsyncClient(server.address, reconnect_timeout=0) as client:
        async with client.unroll() as sequence, client.unroll() as idle:
            await sequence.send(values[:12])
            server.drain()
            with pytest.raises(ServerDraining) as caught:
                await send_for_ever(sequence, np.ones((1, 3)))
            snapshot = caught.value.snapshot
            assert 12 <= snapshot.step in (sequence.step - 1, sequence.step)
            # The error persists, also for an idle sequence.
            for ended in (sequence, idle):
                with pytest.raises(ServerDraining):
                    await ended.snapshot()
                with pytest.raises(ServerDraining):
                    await ended.close()
        with pytest.raises(Unavailable):
            await client.unroll().open()
    async with AsyncClient(address) as elsewhere, elsewhere.unroll(snapshot=snapshot) as sequence:
        answer = await sequence.send(values[snapshot.step :])
    assert states_of(answer).tobytes() == expected[snapshot.step :].tobytes()


async def test_a_broken_stream_fails_who_waits_and_the_next_sequence_opens_another(
    start: Callable[..., LocalServer],
) -> None:
    first = start(MODEL)
    async with AsyncClient(first.address, wait_for_ready=True, reconnect_timeout=0) as client:
        async with client.unroll() as sequence:
            await sequence.send(random_values(4))
            first.stop()
            with pytest.raises(Unavailable):
                await send_for_ever(sequence, random_values(4))
            with pytest.raises(Unavailable):
                await sequence.snapshot()
        start(MODEL, port=first.port)
        async with client.unroll() as sequence:
            assert (await sequence.send(random_values(4))).first_step == 0


async def test_a_cancelled_send_ends_nothing(address: str) -> None:
    values = random_values(60)
    _, expected, _ = alone(MODEL, values, None)
    async with AsyncClient(address, model="m") as client, client.unroll() as sequence, client.unroll() as other:
        for _ in range(3):
            task = asyncio.create_task(sequence.send(values[:20]))
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        done = sequence.step
        assert done % 20 == 0
        answer = await other.send(values)
        assert (await sequence.send(values)).first_step == done
    assert states_of(answer).tobytes() == expected.tobytes()


async def test_leaving_by_an_exception_closes_the_sequence_on_the_server(start: Callable[..., LocalServer]) -> None:
    server = start(MODEL, limits=replace(LIMITS, max_open_sequences=1))
    async with AsyncClient(server.address) as client:
        for _ in range(3):
            with pytest.raises(ZeroDivisionError):
                await fail_within(client.unroll())
        async with client.unroll():
            with pytest.raises(InvalidArgument, match="1 allowed"):
                await client.unroll().open()


async def test_closing_the_client_ends_its_sequences(address: str) -> None:
    client = AsyncClient(address, model="m")
    sequence = await client.unroll().open()
    await client.close()
    with pytest.raises(Unavailable, match="the client was closed"):
        await sequence.send(random_values(1))
    with pytest.raises(RuntimeError, match="the client is closed"):
        await client.unroll().open()
