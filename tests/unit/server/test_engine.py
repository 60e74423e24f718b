"""The engine: the same bits in any company, work that is dropped or fails alone, a bounded queue."""

import asyncio
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.models import alone, random_network, served

from unroll_server.engine import Engine
from unroll_server.errors import InternalError, OverloadedError
from unroll_server.models import Model
from unroll_server.runtimes.base import TickResult
from unroll_server.types import Float32Array, State
from unroll_server.work import Batch, Progress, Stretch

ONE_LAYER = served(random_network(), "one")
TWO_LAYERS = served(random_network(layers=2), "two")
BINARY = served(random_network(outputs=1), "binary")


@asynccontextmanager
async def running(*models: Model, lanes: int = 4, steps: int = 5, queued: int = 10**6) -> AsyncIterator[Engine]:
    engine = Engine(models, max_lanes=lanes, tick_steps=steps, max_queued_steps=queued)
    try:
        yield engine
    finally:
        await asyncio.to_thread(engine.close)


def random_values(model: Model, steps: int, seed: int) -> Float32Array:
    return np.random.default_rng(seed).normal(size=(steps, model.spec.input_size)).astype(np.float32)


def random_state(model: Model, seed: int) -> State:
    rng = np.random.default_rng(seed)
    return tuple(rng.uniform(-1, 1, shape).astype(np.float32) for shape in model.spec.state_shapes)


def batch_of(model: Model, sequences: Sequence[Float32Array], states: Sequence[State | None]) -> Batch:
    offsets = np.cumsum([0, *(len(sequence) for sequence in sequences)])
    return Batch(model, np.concatenate(sequences), offsets, states, keeps_states=True)


def stretch_of(
    model: Model, values: Float32Array, state: State | None = None, step: int = 0, every: int = 1
) -> Stretch:
    return Stretch(model, values, state, first_step=step, every=every, states=True, logits=True)


async def collect(engine: Engine, stretch: Stretch) -> list[Progress]:
    with engine.stream(stretch):
        return [progress async for progress in stretch.progress()]


@settings(max_examples=40, deadline=None)
@given(
    model=st.sampled_from([ONE_LAYER, TWO_LAYERS, BINARY]),
    requests=st.lists(st.lists(st.tuples(st.integers(1, 23), st.booleans()), min_size=1, max_size=5), max_size=4),
    streams=st.lists(st.lists(st.integers(1, 13), min_size=1, max_size=4), max_size=3),
    lanes=st.integers(1, 7),
    steps=st.integers(1, 9),
)
def test_every_sequence_gets_the_bits_that_it_gets_alone(
    model: Model, requests: list[list[tuple[int, bool]]], streams: list[list[int]], lanes: int, steps: int
) -> None:
    async def classify(engine: Engine, shape: list[tuple[int, bool]], seed: int) -> None:
        sequences = [random_values(model, length, seed + index) for index, (length, _) in enumerate(shape)]
        states = [random_state(model, seed + index) if given else None for index, (_, given) in enumerate(shape)]
        batch = batch_of(model, sequences, states)
        await engine.classify(batch)
        for index, (sequence, state) in enumerate(zip(sequences, states, strict=True)):
            logits, _, final = alone(model, sequence, state)
            assert batch.logits[index].tobytes() == logits[-1].tobytes()
            kept = batch.final_states[index]
            assert kept is not None
            assert [array.tobytes() for array in kept] == [array.tobytes() for array in final]

    async def stream(engine: Engine, cuts: list[int], seed: int) -> None:
        values = random_values(model, sum(cuts), seed)
        logits, states, final = alone(model, values, None)
        state, step, parts = None, 0, []
        for cut in cuts:
            stretch = stretch_of(model, values[step : step + cut], state, step)
            parts += await collect(engine, stretch)
            state, step = stretch.final_state, step + cut
        got_states = [part.states for part in parts if part.states is not None]
        got_logits = [part.logits for part in parts if part.logits is not None]
        assert np.concatenate(got_states).tobytes() == states.tobytes()
        assert np.concatenate(got_logits).tobytes() == logits.tobytes()
        assert state is not None
        assert [array.tobytes() for array in state] == [array.tobytes() for array in final]

    async def everything() -> None:
        async with running(model, lanes=lanes, steps=steps) as engine:
            await asyncio.gather(
                *(classify(engine, shape, 100 * number) for number, shape in enumerate(requests)),
                *(stream(engine, cuts, 100 * number + 50) for number, cuts in enumerate(streams)),
            )

    asyncio.run(everything())


@given(st.integers(0, 9), st.integers(1, 20), st.integers(1, 6), st.integers(1, 7))
@settings(max_examples=40, deadline=None)
def test_every_nth_step_is_reported_whatever_the_cut(first: int, length: int, every: int, tick: int) -> None:
    values = random_values(ONE_LAYER, length, seed=length)
    _, states, _ = alone(ONE_LAYER, values, None)

    async def report() -> list[Progress]:
        async with running(ONE_LAYER, steps=tick) as engine:
            return await collect(engine, stretch_of(ONE_LAYER, values, None, first, every))

    parts = asyncio.run(report())
    assert [part.offset for part in parts] == list(range(0, length, tick))
    assert sum(part.steps for part in parts) == length
    expected = [states[step - first] for step in range(first, first + length) if (step + 1) % every == 0]
    got = np.concatenate([part.states for part in parts if part.states is not None])
    assert got.tobytes() == b"".join(state.tobytes() for state in expected)


class GatedRuntime:
    """The real runtime behind a gate, so that a test decides when a tick may run."""

    name, device, artifact, bitwise = "onnx", "cpu", "model.scan.onnx", True

    def __init__(self, model: Model) -> None:
        self._inner = model.runtime
        self.gate = threading.Semaphore(0)
        self.entered = threading.Semaphore(0)
        self.lanes: list[int] = []
        self.fails = False

    def run(self, x: Float32Array, state: State) -> TickResult:
        self.entered.release()
        self.gate.acquire()
        self.lanes.append(x.shape[1])
        if self.fails:
            raise MemoryError("no room")
        return self._inner.run(x, state)


def gated() -> tuple[GatedRuntime, Model]:
    runtime = GatedRuntime(ONE_LAYER)
    return runtime, served(random_network(), "gated", runtime=runtime)


async def test_work_whose_caller_left_is_dropped_at_the_next_tick() -> None:
    runtime, model = gated()
    async with running(model, lanes=2, steps=5) as engine:
        leaving = asyncio.create_task(collect(engine, stretch_of(model, random_values(model, 5000, 0))))
        waiting = asyncio.create_task(collect(engine, stretch_of(model, random_values(model, 5, 1))))
        await asyncio.to_thread(runtime.entered.acquire)
        leaving.cancel()
        await asyncio.wait({leaving})
        runtime.gate.release(50)
        await waiting
        staying = await collect(engine, stretch_of(model, random_values(model, 10, 2)))
        assert sum(part.steps for part in staying) == 10
    # At most: the tick that ran when the caller left, the neighbour's own, and the two of the last stretch.
    assert len(runtime.lanes) <= 4


async def test_a_failing_runtime_fails_that_tick_s_callers_and_the_engine_goes_on() -> None:
    runtime, model = gated()
    runtime.gate.release(50)
    async with running(model, ONE_LAYER) as engine:
        runtime.fails = True
        with pytest.raises(InternalError):
            await engine.classify(batch_of(model, [random_values(model, 3, 0)], [None]))
        with pytest.raises(InternalError):
            await collect(engine, stretch_of(model, random_values(model, 3, 0)))
        runtime.fails = False
        await engine.classify(batch_of(model, [random_values(model, 3, 0)], [None]))


async def test_the_queue_is_bounded_in_timesteps_and_takes_work_again_when_it_is_empty() -> None:
    runtime, model = gated()
    async with running(model, queued=100) as engine:
        first = asyncio.create_task(engine.classify(batch_of(model, [random_values(model, 90, 0)], [None])))
        await asyncio.to_thread(runtime.entered.acquire)
        with pytest.raises(OverloadedError, match="100 at most"):
            await engine.classify(batch_of(model, [random_values(model, 11, 0)], [None]))
        runtime.gate.release(1000)
        await first
        # Larger than the queue, yet it can be answered at all: it runs when nothing else waits.
        await engine.classify(batch_of(model, [random_values(model, 500, 0)], [None]))


async def test_two_models_share_the_engine() -> None:
    async with running(ONE_LAYER, TWO_LAYERS, lanes=2) as engine:
        batches = [batch_of(model, [random_values(model, 40, 0)], [None]) for model in (ONE_LAYER, TWO_LAYERS) * 3]
        await asyncio.gather(*(engine.classify(batch) for batch in batches))
        for batch in batches:
            logits, _, _ = alone(batch.model, batch.values, None)
            assert batch.logits[0].tobytes() == logits[-1].tobytes()
