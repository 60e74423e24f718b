"""One open sequence: repeated chunks count once, and every answer keeps its bits."""

import asyncio
import gc
import weakref

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.models import alone, random_network, served
from support.values import random_values

from unroll_engine.async_engine import AsyncEngine
from unroll_engine.errors import RequestError, SequenceStateError
from unroll_engine.models.spec import Float32Array
from unroll_server.sequence import PIECE_STEPS, REPLAY_CHUNKS, OpenSequence, ReplayWindow
from unroll_server.telemetry.metrics import Metrics

MODEL = served(random_network())


def new_engine() -> AsyncEngine:
    return AsyncEngine([MODEL], max_lanes=4, tick_steps=5, max_queued_steps=10**6, metrics=Metrics())


class Collected(OpenSequence):
    """A sequence that keeps the states of a chunk, and resumes at once when it pauses."""

    def __init__(self, engine: AsyncEngine, window: ReplayWindow | None = None) -> None:
        super().__init__(engine, MODEL, 0, None, window or ReplayWindow())
        self.next: int | None = None
        self.states: list[Float32Array] = []
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def on_steps(self, first_step: int, logits: Float32Array, states: Float32Array) -> None:
        assert self.next in (None, first_step)
        assert len(logits) == len(states)
        self.next = first_step + len(states)
        self.states.append(states)

    def on_pause(self) -> None:
        self.resume()

    def on_end(self, error: RequestError | None) -> None:
        if error:
            self.done.set_exception(error)
        else:
            self.done.set_result(None)

    async def answer(self, first_step: int, values: Float32Array) -> Float32Array:
        """The states of a chunk."""
        self.next, self.states = None, []
        self.done = asyncio.get_running_loop().create_future()
        self.start(first_step, values)
        await self.done
        return np.concatenate(self.states)


@settings(max_examples=40)
@given(
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=10),
    repeats=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=8),
)
def test_chunks_sent_again_are_answered_the_same_and_applied_once(
    sizes: list[int], repeats: list[tuple[int, int]]
) -> None:
    values = random_values(sum(sizes))
    _, expected, final = alone(MODEL, values, None)
    begins = [sum(sizes[:index]) for index in range(len(sizes))]

    async def check() -> None:
        engine = new_engine()
        try:
            sequence = Collected(engine)
            for index, (begin, size) in enumerate(zip(begins, sizes, strict=True)):
                chunks = [begin, *(begins[again] for when, again in repeats if when == index and again <= index)]
                for first in chunks:
                    count = sizes[begins.index(first)]
                    got = await sequence.answer(first, values[first : first + count])
                    assert got.tobytes() == expected[first : first + count].tobytes()
                assert sequence.step == begin + size
            assert sequence.state is not None
            assert sequence.state[0].tobytes() == final[0].tobytes()
        finally:
            await asyncio.to_thread(engine.close)

    asyncio.run(check())


async def test_a_gap_an_overlap_other_values_and_a_chunk_too_old_are_refused_and_change_nothing() -> None:
    engine = new_engine()
    try:
        sequence = Collected(engine)
        values = random_values(2 * (REPLAY_CHUNKS + 2))
        for first in range(0, len(values), 2):
            await sequence.answer(first, values[first : first + 2])
        step, state = sequence.step, sequence.state
        wrong = [
            (step + 1, values[:2], f"continues at step {step}"),
            (step - 1, values[:2], f"continues at step {step}"),
            (step - 2, values[:2], "in a chunk of other values"),
            (step - 2, values[-2:-1], "in a chunk of other values"),
            (0, values[:2], f"again one of the last {REPLAY_CHUNKS} chunks"),
        ]
        for first, chunk, says in wrong:
            with pytest.raises(SequenceStateError, match=says):
                await sequence.answer(first, chunk)
        assert (sequence.step, sequence.state) == (step, state)
    finally:
        await asyncio.to_thread(engine.close)


async def test_a_chunk_of_many_pieces_has_the_bits_of_one_and_one_that_is_left_changes_nothing() -> None:
    engine = new_engine()
    try:
        sequence = Collected(engine)
        values = random_values(3 * PIECE_STEPS + 5)
        sequence.start(0, values)
        sequence.cancel()
        assert (sequence.step, sequence.state) == (0, None)
        got = await sequence.answer(0, values)
        assert got.tobytes() == alone(MODEL, values, None)[1].tobytes()
        assert sequence.step == len(values)
    finally:
        await asyncio.to_thread(engine.close)


async def test_a_stream_s_latest_chunks_can_be_repeated_over_all_its_sequences() -> None:
    engine = new_engine()
    try:
        shared = ReplayWindow()
        sequences = [Collected(engine, shared) for _ in range(REPLAY_CHUNKS + 3)]
        values = random_values(2)
        answers = [await sequence.answer(0, values) for sequence in sequences]
        for sequence in sequences[:3]:
            with pytest.raises(SequenceStateError, match="0, the sequence continues at step 2"):
                await sequence.answer(0, values)
        for sequence, before in zip(sequences[3:], answers[3:], strict=True):
            assert (await sequence.answer(0, values)).tobytes() == before.tobytes()
    finally:
        await asyncio.to_thread(engine.close)


async def test_what_is_kept_of_a_stream_s_latest_chunks_keeps_no_sequence_that_ended() -> None:
    engine = new_engine()
    try:
        window = ReplayWindow()
        sequence = Collected(engine, window)
        await sequence.answer(0, random_values(3))
        ended = weakref.ref(sequence)
        del sequence
        gc.collect()
        assert ended() is None
    finally:
        await asyncio.to_thread(engine.close)
