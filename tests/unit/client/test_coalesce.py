"""Coalescing: many callers, few RPCs, and the bits of separate calls."""

import asyncio
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from support.models import alone, random_network, served
from support.values import random_values
from support.waiting import wait_until
from unit.client.gated import Gated, labels_of
from unit.client.harness import LIMITS, MODEL, TWO_LAYERS, LocalServer

from unroll_client import AsyncClient, Classification, Client, Snapshot
from unroll_proto.v1.unroll_pb2_grpc import UnrollServiceServicer
from unroll_server.config import Limits

Array = NDArray[np.float32]
ROOMY = Limits(max_sequences=4096, max_steps=65536, max_open_sequences=100, max_message_bytes=1 << 24)
MODELS = {"m": MODEL, "deep": TWO_LAYERS}

calls = st.lists(
    st.tuples(
        st.sampled_from(sorted(MODELS)),
        st.lists(st.integers(1, LIMITS.max_steps), min_size=1, max_size=10),
        st.booleans(),
        st.booleans(),
    ),
    max_size=30,
)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(calls)
async def test_whatever_calls_meet_each_gets_the_bits_of_a_call_alone(
    address: str, calls: list[tuple[str, list[int], bool, bool]]
) -> None:
    async with AsyncClient(address) as client:
        begun = {name: await begin(client, name) for name in MODELS}
        waiting = []
        for seed, (name, lengths, from_state, with_states) in enumerate(calls):
            sequences = [random_values(length, seed + index) for index, length in enumerate(lengths)]
            # Every second sequence resumes from a state, the others begin at the zero state.
            states = [begun[name] if index % 2 else None for index in range(len(lengths))] if from_state else None
            waiting.append(
                client.classify(sequences, model=name, initial_states=states, return_final_states=with_states)
            )
        results = await asyncio.gather(*waiting)
    for seed, ((name, lengths, from_state, with_states), result) in enumerate(zip(calls, results, strict=True)):
        assert (result.model, len(result), result.final_states is not None) == (name, len(lengths), with_states)
        for index, length in enumerate(lengths):
            before = begun[name] if from_state and index % 2 else None
            check_one(result, index, name, random_values(length, seed + index), before)


async def begin(client: AsyncClient, name: str) -> Snapshot:
    result = await client.classify([random_values(5, 99)], model=name, return_final_states=True)
    assert result.final_states is not None
    return result.final_states[0]


def check_one(result: Classification, index: int, name: str, values: Array, before: Snapshot | None) -> None:
    model = MODELS[name]
    logits, _, (final,) = alone(model, values, before.state if before else None)
    assert result.logits[index].tobytes() == logits[-1].tobytes()
    assert result.labels[index] == model.spec.class_labels[int(logits[-1].argmax())]
    assert result.label_indices[index] == result.probabilities[index].argmax()
    if result.final_states is not None:
        snapshot = result.final_states[index]
        assert snapshot.step == len(values) + (before.step if before else 0)
        assert snapshot.state[0].tobytes() == final.tobytes()


async def test_a_thousand_callers_cost_tens_of_calls(start: Callable[..., LocalServer]) -> None:
    server = start(limits=ROOMY)
    sequences = [random_values(1 + seed % 40, seed) for seed in range(1000)]
    async with AsyncClient(server.address) as client:
        results = await asyncio.gather(*(client.classify([sequence]) for sequence in sequences))
        assert server.calls["Classify"] < 50
        assert server.calls["GetModel"] == 1
        # Again, with a known model, and with callers that repeat once they are answered.
        server.calls.clear()
        await asyncio.gather(*(ask_again(client, sequence, 3) for sequence in sequences))
        assert server.calls["Classify"] < 150
        assert not server.calls["GetModel"]
    async with AsyncClient(server.address, coalesce=False) as client:
        expected = await client.classify(sequences)
    for index, result in enumerate(results):
        assert result.labels == [expected.labels[index]]
        assert result.logits.tobytes() == expected.logits[index].tobytes()
        assert result.probabilities.tobytes() == expected.probabilities[index].tobytes()
        # A kept result does not keep those of other callers alive.
        assert result.logits.base is result.probabilities.base is result.label_indices.base is None


async def ask_again(client: AsyncClient, sequence: Array, times: int) -> None:
    for _ in range(times):
        await client.classify([sequence])


async def test_without_coalescing_each_call_is_an_rpc(start: Callable[..., LocalServer]) -> None:
    server = start()
    async with AsyncClient(server.address, coalesce=False) as client:
        await asyncio.gather(*(client.classify([random_values(3, seed)]) for seed in range(50)))
    assert (server.calls["Classify"], server.calls["GetModel"]) == (50, 1)


async def test_one_request_is_within_the_server_s_limits(start: Callable[..., LocalServer]) -> None:
    # Beyond 8 sequences or 4,096 bytes the server would refuse, and more calls would come.
    wide = served(random_network(features=100), "wide")
    for model, features, most in ((MODEL, 3, 8), (wide, 100, 1)):
        server = start(model)
        async with AsyncClient(server.address) as client:
            await asyncio.gather(*(client.classify([random_values(6, seed, features=features)]) for seed in range(40)))
        assert server.calls["Classify"] == 40 / most


async def test_only_the_same_question_shares_a_request(script: Callable[[UnrollServiceServicer], str]) -> None:
    servicer = Gated()
    async with AsyncClient(script(servicer)) as client:
        one = [random_values(3)]
        snapshot = Snapshot("m", 1, "simple_rnn", 3, (bytes(8),))
        questions: list[dict[str, Any]] = [
            {},
            {"model": "other"},
            {"version": 1},
            {"return_final_states": True},
            {"initial_states": [snapshot]},
        ]
        servicer.gate.set()
        await asyncio.gather(*(client.classify(one, **question) for question in questions for _ in range(4)))
    asked = sorted((request.model, request.version, len(request.lengths)) for request in servicer.requests)
    assert asked == [("", 0, 4), ("", 0, 4), ("", 0, 4), ("", 1, 4), ("other", 0, 4)]


async def test_an_idle_client_sends_at_once_and_a_busy_one_gathers(
    script: Callable[[UnrollServiceServicer], str],
) -> None:
    servicer = Gated()
    async with AsyncClient(script(servicer)) as client:
        first = asyncio.create_task(client.classify([random_values(1)]))
        await servicer.until(1)
        second = asyncio.create_task(client.classify([random_values(2)]))
        await servicer.until(2)
        # Two are in flight and not answered: these wait, and then go together, in order.
        others = [asyncio.create_task(client.classify([random_values(3 + index)])) for index in range(20)]
        await asyncio.sleep(0)
        assert len(servicer.requests) == 2
        servicer.gate.set()
        results = await asyncio.gather(first, second, *others)
    assert [list(request.lengths) for request in servicer.requests] == [[1], [2], list(range(3, 23))]
    assert [result.labels for result in results] == [[f"{steps} steps"] for steps in range(1, 23)]


async def test_what_fills_a_request_goes_though_others_are_under_way(
    script: Callable[[UnrollServiceServicer], str],
) -> None:
    servicer = Gated()
    async with AsyncClient(script(servicer)) as client:
        waiting = [asyncio.create_task(client.classify([random_values(2)])) for _ in range(3 * 128)]
        await servicer.until(3)
        servicer.gate.set()
        await asyncio.gather(*waiting)
    assert [len(request.lengths) for request in servicer.requests] == [128, 128, 128]


async def test_a_request_that_hangs_holds_up_nobody(script: Callable[[UnrollServiceServicer], str]) -> None:
    servicer = Gated(hangs=13)
    servicer.gate.set()
    async with AsyncClient(script(servicer)) as client:
        hanging = []
        for _ in range(5):
            hanging.append(asyncio.create_task(client.classify([random_values(13)])))
            await servicer.until(len(servicer.requests) + 1)
            assert labels_of(await client.classify([random_values(2)])) == ["2 steps"]
        assert not any(task.done() for task in hanging)
        for task in hanging:
            task.cancel()


async def test_a_large_call_does_not_wait_with_small_ones(script: Callable[[UnrollServiceServicer], str]) -> None:
    servicer = Gated()
    async with AsyncClient(script(servicer)) as client:
        small = [asyncio.create_task(client.classify([random_values(2)])) for _ in range(3)]
        large = asyncio.create_task(client.classify([random_values(8)] * 200))
        await servicer.until(2)
        servicer.gate.set()
        assert labels_of(await large) == ["8 steps"] * 200
        await asyncio.gather(*small)
    assert sorted(len(request.lengths) for request in servicer.requests) == [3, 200]


class Observed:
    """An array of which a client's reads are counted, by the number of its steps."""

    def __init__(self, values: Array, reads: Counter[int]) -> None:
        self._values = values
        self._reads = reads

    def __array__(self, dtype: object = None, copy: object = None) -> Array:
        self._reads[len(self._values)] += 1
        return self._values


def test_calls_of_many_threads_share_requests(script: Callable[[UnrollServiceServicer], str]) -> None:
    servicer = Gated()
    with Client(script(servicer)) as client, ThreadPoolExecutor(40) as pool:
        taken = Counter[int]()
        results = [pool.submit(client.classify, [Observed(random_values(1 + index), taken)]) for index in range(40)]
        # No more than two requests are sent before an answer, so the other calls gather.
        wait_until(lambda: len(taken) == 40 and len(servicer.requests) == 2)
        servicer.gate.set()
        assert [labels_of(result.result(30)) for result in results] == [[f"{1 + index} steps"] for index in range(40)]
    assert len(servicer.requests) == 3


@pytest.mark.parametrize("coalesce", [True, False])
async def test_values_are_taken_when_the_call_is_made(start: Callable[..., LocalServer], coalesce: bool) -> None:
    values = random_values(9)
    expected = alone(MODEL, values, None)[0][-1].tobytes()
    async with AsyncClient(start().address, coalesce=coalesce) as client:
        await client.model()
        waiting = asyncio.create_task(client.classify([values]))
        await asyncio.sleep(0)
        values[:] = 0
        assert (await waiting).logits[0].tobytes() == expected
