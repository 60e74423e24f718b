"""Sequences that survive their server: every step once, in order, with the bits of an undisturbed run."""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.models import alone, random_network, served
from support.proxy import CuttingProxy
from support.servicers import PartialServicer
from support.values import Float32Array, cut, random_values
from support.waiting import until
from unit.client.harness import LIMITS, MODEL, TWO_LAYERS, LocalServer
from unit.client.test_stream_faults import Scripted, ones, steps

from unroll_client import (
    AsyncClient,
    AsyncSequence,
    Client,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    Snapshot,
    Steps,
    Unavailable,
)
from unroll_proto.v1 import unroll_pb2 as pb

Start = Callable[..., LocalServer]
KEPT_BYTES = 8 << 20


async def collected(sequence: AsyncSequence, chunk: Float32Array) -> list[Steps]:
    return [steps async for steps in sequence.stream(chunk)]


def check(parts: list[Steps], model: Any, values: Float32Array, every: int = 1, first: int = 0) -> None:
    """Checks that steps come once and in order, with the bits of an undisturbed run."""
    logits, states, _ = alone(model, values, None)
    step = first
    for part in parts:
        assert (part.first_step, part.count > 0) == (step, True)
        step += part.count
    assert step == len(values)
    reported = [index for index in range(first, len(values)) if (index + 1) % every == 0]
    assert np.concatenate([part.steps for part in parts]).tolist() == reported
    assert b"".join(part.states.tobytes() for part in parts if part.states is not None) == states[reported].tobytes()
    assert b"".join(part.logits.tobytes() for part in parts if part.logits is not None) == logits[reported].tobytes()


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    cuts=st.lists(st.integers(1, 6000), max_size=6),
    sizes=st.lists(st.integers(1, 90), min_size=1, max_size=8),
    every=st.integers(1, 9),
    model=st.sampled_from([MODEL, TWO_LAYERS]),
    asked=st.sets(st.integers(0, 7)),
    together=st.booleans(),
)
async def test_connections_that_break_lose_double_and_change_nothing(
    address: str,
    cuts: list[int],
    sizes: list[int],
    every: int,
    model: Any,
    asked: set[int],
    together: bool,
) -> None:
    values = random_values(sum(sizes))
    chunks = cut(values, sizes)
    async with CuttingProxy(address, cuts) as proxy, AsyncClient(proxy.address, wait_for_ready=True) as client:
        sequence = client.unroll(model.spec.key.name, logits=True, every=every)
        waiting = []
        for index, chunk in enumerate(chunks):
            waiting.append(asyncio.create_task(collected(sequence, chunk)))
            await asyncio.sleep(0)  # The chunk takes its turn before the snapshot.
            if not together:
                await waiting[-1]
            if index in asked:
                snapshot = await sequence.snapshot()
                assert snapshot.step == sum(sizes[: index + 1])
        parts = [part for answers in waiting for part in await answers]
        last = await sequence.close()
    check(parts, model, values, every)
    _, _, (final,) = alone(model, values, None)
    assert (last.step, last.state[0].tobytes()) == (len(values), final.tobytes())


async def test_a_drained_server_s_sequences_go_on_at_another_address(start: Start) -> None:
    leaving, staying = start(MODEL), start(MODEL)
    values = random_values(60)
    async with AsyncClient([leaving.address, staying.address], model="m") as client:
        sequences = [client.unroll(logits=True) for _ in range(20)]
        starts = [await collected(sequence, values[:7]) for sequence in sequences]
        assert (leaving.calls["Unroll"], staying.calls["Unroll"]) in ((1, 0), (0, 1))
        if staying.calls["Unroll"]:
            leaving, staying = staying, leaving
        leaving.drain()
        rests = [
            [part for chunk in cut(values[7:], [10] * 5) for part in await collected(sequence, chunk)]
            for sequence in sequences
        ]
        assert [(await sequence.close()).step for sequence in sequences] == [60] * 20
        assert staying.calls["Unroll"] == 1
    for first, rest in zip(starts, rests, strict=True):
        check([*first, *rest], MODEL, values)


async def test_a_killed_server_s_sequences_go_on_when_it_is_back(start: Start) -> None:
    first = start(MODEL, TWO_LAYERS)
    values = random_values(400)
    async with AsyncClient(first.address) as client, client.unroll("deep", logits=True) as sequence:
        parts = [part for chunk in cut(values[:200], [50] * 3) for part in await collected(sequence, chunk)]
        first.stop()
        waiting = asyncio.create_task(collected(sequence, values[200:]))
        await asyncio.sleep(0)
        second = start(MODEL, TWO_LAYERS, port=first.port)
        parts += await waiting
        last = await sequence.close()
        assert second.calls["Unroll"] >= 1
    check(parts, TWO_LAYERS, values)
    _, _, (final,) = alone(TWO_LAYERS, values, None)
    assert last.state[0].tobytes() == final.tobytes()


def test_it_is_the_same_for_who_blocks(start: Start) -> None:
    first = start(MODEL)
    values = random_values(30)
    with Client(first.address) as client, client.unroll(logits=True) as sequence:
        parts = [sequence.send(values[:10])]
        first.stop()
        start(MODEL, port=first.port)
        parts += sequence.stream(values[10:])
        assert sequence.close().step == 30
    check(parts, MODEL, values)


async def test_an_idle_sequence_survives_however_long_its_server_is_away(start: Start) -> None:
    first = start(MODEL)
    values = random_values(20)
    async with AsyncClient(first.address) as client:
        sequence = client.unroll(logits=True)
        parts = await collected(sequence, values[:10])
        first.stop()
        with pytest.raises(Unavailable):
            await client.unroll().open()
        start(MODEL, port=first.port)
        parts += await collected(sequence, values[10:])
    check(parts, MODEL, values)


async def test_with_no_server_left_the_error_has_the_last_snapshot(start: Start, address: str) -> None:
    doomed = start(MODEL)
    values = random_values(300)
    async with AsyncClient(doomed.address, reconnect_timeout=0.5) as client:
        sequence = await client.unroll().open()
        await sequence.send(values[:200])
        snapshot = await sequence.snapshot()
        parts = await collected(sequence, values[200:210])
        doomed.stop()
        with pytest.raises(Unavailable) as caught:
            await sequence.send(values[210:])
        # The error persists.
        with pytest.raises(Unavailable):
            await sequence.close()
    assert caught.value.snapshot == snapshot
    async with AsyncClient(address) as elsewhere, elsewhere.unroll(snapshot=snapshot, logits=True) as sequence:
        again = await collected(sequence, values[200:])
    check(again, MODEL, values, first=200)
    assert parts[0].first_step == 200


async def test_a_version_that_is_gone_is_missed_and_not_replaced(start: Start) -> None:
    first = start(MODEL)
    async with AsyncClient(first.address, reconnect_timeout=1) as client:
        sequence = client.unroll(logits=True)
        await sequence.send(random_values(200))
        first.stop()
        start(served(random_network(seed=1), "m", version=2), port=first.port)
        with pytest.raises((NotFound, InvalidArgument), match="m") as caught:
            await sequence.send(random_values(5))
        assert caught.value.snapshot is None or caught.value.snapshot.version == 1
        async with client.unroll() as other:
            assert other.version == 2


async def test_a_loss_that_is_not_to_be_survived_is_told_with_the_last_snapshot(start: Start) -> None:
    first = start(MODEL)
    async with AsyncClient(first.address, reconnect_timeout=0) as client:
        sequence = client.unroll()
        await sequence.send(random_values(200))
        snapshot = await sequence.snapshot()
        first.stop()
        with pytest.raises(Unavailable) as caught:
            await sequence.send(random_values(5))
        assert caught.value.snapshot == snapshot


async def test_a_client_that_is_closed_ends_sequences_that_look_for_a_server(start: Start) -> None:
    first = start(MODEL)
    client = AsyncClient(first.address)
    sequence = client.unroll()
    await sequence.send(random_values(5))
    first.stop()
    waiting = asyncio.create_task(sequence.send(random_values(5)))
    idle = client.unroll()
    with pytest.raises(Unavailable):
        await client.unroll().open()
    await client.close()
    with pytest.raises(Unavailable, match="the client was closed"):
        await waiting
    with pytest.raises(RuntimeError, match="the client is closed"):
        await idle.open()
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_what_is_kept_to_be_sent_again_is_bounded(script: Callable[[PartialServicer], str]) -> None:
    received = 0

    def answer(chunk: pb.Chunk) -> list[pb.UnrollResponse]:
        nonlocal received
        received += len(chunk.values)
        return [steps(chunk.first_step, 1, 1)] if len(chunk.values) == 12 else []

    async with AsyncClient(script(Scripted(answer))) as client:
        sequence, other = client.unroll(), client.unroll()
        waiting = [asyncio.create_task(sequence.send(ones(100_000))) for _ in range(20)]
        await until(lambda: received > KEPT_BYTES)
        # Both share a stream, so messages sent before an answer to the other one were received.
        for _ in range(5):
            await other.send(ones(1))
        assert received <= KEPT_BYTES + 100_000 * 12 + 5 * 12
        for task in waiting:
            task.cancel()


async def test_what_follows_a_refused_part_of_a_chunk_does_not_take_its_place(start: Start) -> None:
    values = random_values(4000)
    generous = start(MODEL, limits=replace(LIMITS, max_steps=65))
    async with AsyncClient(generous.address, model="m") as client, client.unroll(logits=True) as sequence:
        parts = await collected(sequence, values[:8])
        generous.stop()
        start(MODEL, port=generous.port)
        # By the limits that the client knows this is cut into many parts, of which the new server refuses the first.
        with pytest.raises(InvalidArgument):
            await sequence.send(values[8:])
        assert sequence.step == 8
        for chunk in cut(values[8:], [LIMITS.max_steps] * 63):
            parts += await collected(sequence, chunk)
    check(parts, MODEL, values)


async def test_a_sequence_does_not_go_on_with_other_weights_of_the_same_version(start: Start) -> None:
    first, second = (
        replace(model, spec=replace(MODEL.spec, bundle=bundle))
        for model, bundle in ((MODEL, b"A"), (served(random_network(seed=9)), b"B"))
    )
    server = start(first)
    async with AsyncClient(server.address) as client:
        begun, gone_on = client.unroll(), client.unroll()
        await begun.send(random_values(5))
        snapshot = await gone_on.snapshot()
        server.stop()
        start(second, port=server.port)
        for sequence in (begun, gone_on):
            with pytest.raises(FailedPrecondition, match="m/1 with bundle 41, served is m/1 with bundle 42"):
                await sequence.send(random_values(5))
        assert (snapshot.bundle, Snapshot.from_bytes(snapshot.to_bytes())) == (b"A", snapshot)
