"""The engine: the same bits in any batch, dropped or failed jobs without effect on others, a bounded queue."""

import asyncio
import gc
import threading
import time
import weakref
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.counting import Counting
from support.models import alone, random_classifier, random_network, served
from support.values import random_values

from unroll_engine.async_engine import AsyncEngine
from unroll_engine.core import INITIAL_OVERHEAD
from unroll_engine.errors import ExpiredError, InternalError, ModelNotFoundError, OverloadedError, RequestError
from unroll_engine.jobs import BatchJob, ChunkJob
from unroll_engine.models.loader import Model
from unroll_engine.models.spec import Float32Array, State
from unroll_engine.runtimes.base import TickResult, Values
from unroll_engine.runtimes.onnx import OnnxCpuRuntime
from unroll_export.graphs.onnx_rnn import build_onnx_rnn
from unroll_export.model import Cell

ONE_LAYER = served(random_network(), "one")
TWO_LAYERS = served(random_network(layers=2), "two")
BINARY = served(random_network(outputs=1), "binary")
LSTM = served(random_classifier("lstm", layers=2), "lstm")
GRU = served(random_classifier("gru"), "gru")
GATED: tuple[tuple[Cell, int], ...] = (("lstm", 1), ("lstm", 2), ("gru", 1))
# The others run in the slots of the step kernel, if it is compiled.
ON_LANES = [
    served(
        random_network(layers=layers),
        f"lanes{layers}",
        runtime=OnnxCpuRuntime(build_onnx_rnn(random_network(layers=layers))),
    )
    for layers in (1, 2)
] + [
    served(
        random_classifier(cell, layers=layers),
        f"lanes-{cell}",
        runtime=OnnxCpuRuntime(build_onnx_rnn(random_classifier(cell, layers=layers))),
    )
    for cell, layers in GATED
]


@asynccontextmanager
async def running(
    *models: Model,
    lanes: int = 4,
    steps: int = 5,
    queued: int = 10**6,
    metrics: Counting | None = None,
    threads: int = 1,
) -> AsyncIterator[AsyncEngine]:
    engine = AsyncEngine(
        models, max_lanes=lanes, tick_steps=steps, max_queued_steps=queued, metrics=metrics, threads=threads
    )
    try:
        yield engine
    finally:
        await asyncio.to_thread(engine.close)


def random_state(model: Model, seed: int) -> State:
    rng = np.random.default_rng(seed)
    return tuple(rng.uniform(-1, 1, shape).astype(np.float32) for _, shape, *_ in model.spec.states)


def stack(model: Model, states: Sequence[State | None]) -> State:
    """Stacks states of sequences for a batch, [num_layers, sequences, hidden_size] each."""
    stacked = model.spec.initial_state(len(states))
    for index, state in enumerate(states):
        for array, value in zip(stacked, state or (), strict=state is not None):
            array[:, index] = value
    return stacked


def batch_of(
    model: Model,
    sequences: Sequence[Float32Array],
    states: Sequence[State | None] | None = None,
    deadline: float = float("inf"),
) -> BatchJob:
    offsets = np.cumsum([0, *(len(sequence) for sequence in sequences)])
    initial = stack(model, states) if states else None
    return BatchJob(model, np.concatenate(sequences), offsets, initial, keeps_states=True, deadline=deadline)


class Heard:
    """A listener that keeps its results."""

    def __init__(self) -> None:
        self.logits: list[Float32Array] = []
        self.states: list[Float32Array] = []
        self.end: asyncio.Future[State] = asyncio.get_running_loop().create_future()

    def progressed(self, count: int, logits: Float32Array, states: Float32Array) -> None:
        assert len(logits) == len(states) == count
        assert not self.end.done()
        self.logits.append(logits)
        self.states.append(states)

    def finished(self, state: State) -> None:
        self.end.set_result(state)

    def failed(self, error: RequestError) -> None:
        self.end.set_exception(error)


async def run_chunk(engine: AsyncEngine, model: Model, values: Float32Array, state: State | None = None) -> Heard:
    heard = Heard()
    job = ChunkJob(model, values, state, heard)
    engine.start(job)
    try:
        await heard.end
    finally:
        engine.end(job)
    return heard


@settings(max_examples=40)
@given(
    model=st.sampled_from([ONE_LAYER, TWO_LAYERS, BINARY, LSTM, GRU, *ON_LANES]),
    requests=st.lists(st.lists(st.tuples(st.integers(1, 23), st.booleans()), min_size=1, max_size=5), max_size=4),
    streams=st.lists(st.lists(st.integers(1, 13), min_size=1, max_size=4), max_size=3),
    lanes=st.integers(1, 7),
    steps=st.integers(1, 9),
    inline=st.sampled_from([0.0, 100e-6, 10.0]),
    threads=st.integers(1, 3),
)
def test_every_sequence_gets_the_bits_that_it_gets_alone(
    model: Model,
    requests: list[list[tuple[int, bool]]],
    streams: list[list[int]],
    lanes: int,
    steps: int,
    inline: float,
    threads: int,
) -> None:
    async def classify(engine: AsyncEngine, shape: list[tuple[int, bool]], seed: int) -> None:
        sequences = [random_values(length, seed + index) for index, (length, _) in enumerate(shape)]
        states = [random_state(model, seed + index) if given else None for index, (_, given) in enumerate(shape)]
        batch = batch_of(model, sequences, states)
        await engine.run(batch)
        for index, (sequence, state) in enumerate(zip(sequences, states, strict=True)):
            logits, _, final = alone(model, sequence, state)
            assert batch.logits[index].tobytes() == logits[-1].tobytes()
            assert batch.final_state is not None
            assert [array[:, index].tobytes() for array in batch.final_state] == [array.tobytes() for array in final]

    async def stream(engine: AsyncEngine, cuts: list[int], seed: int) -> None:
        values = random_values(sum(cuts), seed)
        logits, states, final = alone(model, values, None)
        state: State | None = None
        step, got_states, got_logits = 0, [], []
        for cut in cuts:
            heard = await run_chunk(engine, model, values[step : step + cut], state)
            got_states += heard.states
            got_logits += heard.logits
            state, step = heard.end.result(), step + cut
        assert np.concatenate(got_states).tobytes() == states.tobytes()
        assert np.concatenate(got_logits).tobytes() == logits.tobytes()
        assert state is not None
        assert [array.tobytes() for array in state] == [array.tobytes() for array in final]

    async def everything() -> None:
        async with running(model, lanes=lanes, steps=steps, threads=threads) as engine:
            await asyncio.gather(
                *(classify(engine, shape, 100 * number) for number, shape in enumerate(requests)),
                *(stream(engine, cuts, 100 * number + 50) for number, cuts in enumerate(streams)),
            )

    with pytest.MonkeyPatch.context() as patch:
        # Ticks on the event loop, on the thread, and alternating.
        patch.setattr("unroll_engine.async_engine.INLINE", inline)
        asyncio.run(everything())


@given(
    model=st.sampled_from([ONE_LAYER, ON_LANES[0]]),
    length=st.integers(100, 700),
    lanes=st.integers(1, 3),
    tick=st.integers(1, 200),
)
@settings(max_examples=30)
def test_sequences_longer_than_a_region_keep_their_bits(model: Model, length: int, lanes: int, tick: int) -> None:
    sequences = [random_values(length + 37 * index, seed=index) for index in range(4)]

    async def classify() -> BatchJob:
        async with running(model, lanes=lanes, steps=tick) as engine:
            batch = batch_of(model, sequences)
            await engine.run(batch)
            return batch

    batch = asyncio.run(classify())
    for index, sequence in enumerate(sequences):
        assert batch.logits[index].tobytes() == alone(model, sequence, None)[0][-1].tobytes()


class GatedRuntime:
    """The real runtime behind a gate, so that a test decides when a tick runs."""

    name, device, artifact, bitwise, variant = "onnx", "cpu", "model.onnx", True, ""

    def __init__(self, model: Model) -> None:
        self._inner = model.runtime
        self.gate = threading.Semaphore(0)
        self.entered = threading.Semaphore(0)
        self.lanes: list[int] = []
        self.steps: list[int] = []
        self.fails = False

    def run(self, x: Float32Array, state: State) -> TickResult[Values]:
        self.entered.release()
        self.gate.acquire()
        self.lanes.append(x.shape[1])
        self.steps.append(len(x))
        if self.fails:
            raise MemoryError("no room")
        return self._inner.run(x, state)


def gated() -> tuple[GatedRuntime, Model]:
    runtime = GatedRuntime(ONE_LAYER)
    return runtime, served(random_network(), "gated", runtime=runtime)


@pytest.fixture(autouse=True)
def on_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gated tick must not block the event loop that opens the gate."""
    monkeypatch.setattr("unroll_engine.async_engine.INLINE", 0.0)


async def test_work_whose_caller_left_is_dropped_at_the_next_tick() -> None:
    runtime, model = gated()
    async with running(model, lanes=2, steps=5) as engine:
        leaving = asyncio.create_task(run_chunk(engine, model, random_values(5000)))
        waiting = asyncio.create_task(run_chunk(engine, model, random_values(5, 1)))
        await asyncio.to_thread(runtime.entered.acquire)
        leaving.cancel()
        await asyncio.wait({leaving})
        runtime.gate.release(50)
        await waiting
        staying = await run_chunk(engine, model, random_values(10, 2))
        assert sum(len(part) for part in staying.states) == 10
    # All of it would need a thousand ticks.
    assert len(runtime.lanes) <= 16


async def test_few_lanes_run_more_steps_a_tick_than_all_and_streams_hear_as_often() -> None:
    runtime, model = gated()
    runtime.gate.release(1000)
    async with running(model, lanes=8, steps=4) as engine:
        await engine.run(batch_of(model, [random_values(30)]))
        assert (runtime.lanes, runtime.steps) == ([1], [30])
        await engine.run(batch_of(model, [random_values(30, seed) for seed in range(8)]))
        # There are lanes for a quarter more.
        assert all(lanes * steps <= 4 * 10 for lanes, steps in zip(runtime.lanes, runtime.steps, strict=True))
        assert 4 < max(runtime.steps[1:]) <= 5
        runtime.steps.clear()
        await run_chunk(engine, model, random_values(30, 9))
        assert max(runtime.steps) == 4


async def test_expired_and_cancelled_work_never_reaches_the_model_and_is_counted() -> None:
    runtime, model = gated()
    metrics = Counting()
    async with running(model, lanes=1, metrics=metrics) as engine:
        running_now = asyncio.create_task(engine.run(batch_of(model, [random_values(3)])))
        await asyncio.to_thread(runtime.entered.acquire)
        late = batch_of(model, [random_values(3, 1)] * 2, deadline=time.monotonic())
        expired = asyncio.create_task(engine.run(late))
        left = asyncio.create_task(engine.run(batch_of(model, [random_values(3, 2)] * 3)))
        last = asyncio.create_task(engine.run(batch_of(model, [random_values(3, 3)])))
        await asyncio.sleep(0)
        left.cancel()
        await asyncio.wait({left})
        runtime.gate.release(50)
        with pytest.raises(ExpiredError, match="deadline"):
            await expired
        await asyncio.gather(running_now, last)
    assert runtime.lanes == [1, 1]
    assert metrics.drops == {"expired": 2, "cancelled": 3}


async def test_a_failing_runtime_fails_that_tick_s_callers_and_the_engine_goes_on() -> None:
    runtime, model = gated()
    runtime.gate.release(50)
    async with running(model, ONE_LAYER) as engine:
        runtime.fails = True
        with pytest.raises(InternalError):
            await engine.run(batch_of(model, [random_values(3)]))
        with pytest.raises(InternalError):
            await run_chunk(engine, model, random_values(3))
        runtime.fails = False
        await engine.run(batch_of(model, [random_values(3)]))


async def test_the_queue_is_bounded_in_timesteps_and_takes_work_again_when_it_is_empty() -> None:
    runtime, model = gated()
    async with running(model, queued=100) as engine:
        first = asyncio.create_task(engine.run(batch_of(model, [random_values(90)])))
        await asyncio.to_thread(runtime.entered.acquire)
        with pytest.raises(OverloadedError, match="100 timesteps at most"):
            await engine.run(batch_of(model, [random_values(11)]))
        runtime.gate.release(1000)
        await first
        # Larger than the queue, but it runs when nothing else waits.
        await engine.run(batch_of(model, [random_values(500)]))


async def test_two_models_share_the_engine() -> None:
    async with running(ONE_LAYER, TWO_LAYERS, lanes=2) as engine:
        batches = [batch_of(model, [random_values(40)]) for model in (ONE_LAYER, TWO_LAYERS) * 3]
        await asyncio.gather(*(engine.run(batch) for batch in batches))
        for batch in batches:
            logits, _, _ = alone(batch.model, batch.values, None)
            assert batch.logits[0].tobytes() == logits[-1].tobytes()


async def test_a_step_of_a_stream_does_not_wait_for_bulk_lanes_to_end() -> None:
    runtime, model = gated()
    async with running(model, lanes=4, steps=5) as engine:
        bulk = asyncio.create_task(engine.run(batch_of(model, [random_values(4000)] * 40)))
        await asyncio.to_thread(runtime.entered.acquire)
        step = asyncio.create_task(run_chunk(engine, model, random_values(1, 1)))
        await asyncio.sleep(0)
        # The running tick, and one more.
        runtime.gate.release(2)
        await step
        assert not bulk.done()
        bulk.cancel()
        runtime.gate.release(10**6)


async def test_on_one_core_steps_are_read_and_answered_between_bulk_ticks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unroll_engine.async_engine.ONE_CORE", True)
    monkeypatch.setattr("unroll_engine.async_engine.INLINE", 10.0)
    runtime, model = gated()
    runtime.gate.release(10**6)
    async with running(model, lanes=4, steps=5) as engine:
        bulk = asyncio.create_task(engine.run(batch_of(model, [random_values(400)] * 40)))
        await asyncio.sleep(0)
        for seed in range(3):
            ticks = len(runtime.lanes)
            while len(runtime.lanes) == ticks:  # noqa: ASYNC110  (the turns of the loop matter)
                await asyncio.sleep(0)
            # After a tick, a transport takes a turn of the loop to pass on a step, and one to send its answer.
            if seed:
                await asyncio.sleep(0)
                ticks = len(runtime.lanes)
            await run_chunk(engine, model, random_values(1, seed))
            if seed:
                assert len(runtime.lanes) == ticks + 1
            ticks = len(runtime.lanes)
            await asyncio.sleep(0)
            assert len(runtime.lanes) == ticks
        assert not bulk.done()
        bulk.cancel()


class Chain:
    """A listener that runs a sequence step by step, each started within the delivery of the previous one."""

    def __init__(self, engine: AsyncEngine, values: Float32Array) -> None:
        self.engine = engine
        self.values = values
        self.position = 0
        self.states: list[Float32Array] = []
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.go_on(None)

    def go_on(self, state: State | None) -> None:
        step = self.values[self.position : self.position + 1]
        self.job = ChunkJob(ONE_LAYER, step, state, self)
        self.engine.start(self.job)

    def progressed(self, count: int, logits: Float32Array, states: Float32Array) -> None:
        self.states.append(states)

    def finished(self, state: State) -> None:
        self.engine.end(self.job)
        self.position += 1
        if self.position < len(self.values):
            self.go_on(state)
        else:
            self.done.set_result(None)

    def failed(self, error: RequestError) -> None:
        self.done.set_exception(error)


@pytest.mark.parametrize("inline", [0.0, 50e-6, 200e-6, 1e-3, 10.0])
async def test_the_core_has_one_owner_whoever_runs_the_ticks(inline: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unroll_engine.async_engine.INLINE", inline)
    async with running(ONE_LAYER, lanes=8, steps=16) as engine:
        chains = [Chain(engine, random_values(200, seed)) for seed in range(20)]
        bulk = [batch_of(ONE_LAYER, [random_values(30 + seed, seed)] * 20) for seed in range(10)]
        await asyncio.gather(*(engine.run(batch) for batch in bulk), *(chain.done for chain in chains))
    for chain in chains:
        assert np.concatenate(chain.states).tobytes() == alone(ONE_LAYER, chain.values, None)[1].tobytes()
    for batch in bulk:
        expected = alone(ONE_LAYER, batch.values[: len(batch.values) // 20], None)[0][-1]
        assert batch.logits.tobytes() == expected.tobytes() * 20


@pytest.mark.parametrize("one_core", [False, True])
async def test_more_than_the_loop_may_run_at_once_is_run_all_the_same(
    one_core: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("unroll_engine.async_engine.ONE_CORE", one_core)
    # Between one tick and two, by the cost of these models.
    seconds = 1.01 * (ONE_LAYER.cost.seconds(4, 16) + INITIAL_OVERHEAD)
    monkeypatch.setattr("unroll_engine.async_engine.INLINE", seconds)
    monkeypatch.setattr("unroll_engine.async_engine.LOOP_BUDGET", seconds)
    async with running(ONE_LAYER, lanes=4, steps=16) as engine:
        for round_ in range(3):
            batches = [batch_of(ONE_LAYER, [random_values(16, seed)] * 4) for seed in range(10 * round_)]
            await asyncio.gather(*(engine.run(batch) for batch in batches))
            chain = Chain(engine, random_values(20, round_))
            await chain.done


async def test_a_removed_model_finishes_what_it_has_and_takes_no_more() -> None:
    async with running(ONE_LAYER, TWO_LAYERS, lanes=1, steps=2) as engine:
        values = random_values(50, 1)
        batches = [batch_of(ONE_LAYER, [values]) for _ in range(3)]
        answers = [asyncio.create_task(engine.run(batch)) for batch in batches]
        left = batch_of(ONE_LAYER, [values])
        engine.start(left)
        await asyncio.sleep(0)
        engine.remove_model(ONE_LAYER)
        engine.end(left)
        with pytest.raises(ModelNotFoundError, match="one/1 is no longer served"):
            engine.start(batch_of(ONE_LAYER, [values]))
        await asyncio.gather(*answers)
        logits, _, _ = alone(ONE_LAYER, values, None)
        assert [batch.logits.tobytes() for batch in batches] == [logits[-1:].tobytes()] * 3
        await run_chunk(engine, TWO_LAYERS, random_values(3, 2))
        engine.add_model(ONE_LAYER)
        await run_chunk(engine, ONE_LAYER, values)


async def test_a_failed_batch_is_freed_without_a_garbage_collection() -> None:
    gc.collect()
    gc.disable()
    try:
        async with running(ONE_LAYER) as engine:
            values = random_values(3)
            freed = weakref.ref(values)
            batch = batch_of(ONE_LAYER, [values], deadline=time.monotonic())
            batch.values = values
            with pytest.raises(ExpiredError):
                await engine.run(batch)
            del batch, values
            assert freed() is None
    finally:
        gc.enable()
