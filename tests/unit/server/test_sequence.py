"""One open sequence: whatever is sent again, every chunk counts once and every answer keeps its bits."""

import asyncio
import gc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.models import alone, random_network, served

from unroll_engine.async_engine import AsyncEngine
from unroll_engine.errors import RequestError, SequenceStateError
from unroll_engine.models.spec import Float32Array
from unroll_server.caller import Call
from unroll_server.sequence import PIECE, REPEATABLE, Repeatable, Sequence
from unroll_server.telemetry.metrics import Metrics

MODEL = served(random_network())


def values_of(steps: int) -> Float32Array:
    return np.random.default_rng(steps).normal(size=(steps, MODEL.spec.input_size)).astype(np.float32)


def new_engine() -> AsyncEngine:
    return AsyncEngine([MODEL], max_lanes=4, tick_steps=5, max_queued_steps=10**6, metrics=Metrics())


class Answer:
    """A reader that keeps the states, and goes on when the sequence pauses."""

    def __init__(self, sequence: Sequence) -> None:
        self.sequence = sequence
        self.next: int | None = None
        self.states: list[Float32Array] = []
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def progressed(self, step: int, count: int, logits: Float32Array, states: Float32Array) -> None:
        assert self.next in (None, step)
        assert len(logits) == len(states) == count
        self.next = step + count
        self.states.append(states)

    def paused(self) -> None:
        self.sequence.resume()

    def finished(self) -> None:
        self.done.set_result(None)

    def failed(self, error: RequestError) -> None:
        self.done.set_exception(error)


async def answer(sequence: Sequence, first_step: int, values: Float32Array) -> Float32Array:
    reader = Answer(sequence)
    sequence.start(first_step, values, reader)
    await reader.done
    return np.concatenate(reader.states)


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=10),
    repeats=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=8),
)
def test_chunks_sent_again_are_answered_the_same_and_applied_once(
    sizes: list[int], repeats: list[tuple[int, int]]
) -> None:
    values = values_of(sum(sizes))
    _, expected, final = alone(MODEL, values, None)
    begins = [sum(sizes[:index]) for index in range(len(sizes))]

    async def check() -> None:
        engine = new_engine()
        try:
            sequence = Sequence(engine, MODEL, 0, None, Repeatable(), Call())
            for index, (begin, size) in enumerate(zip(begins, sizes, strict=True)):
                chunks = [begin, *(begins[again] for when, again in repeats if when == index and again <= index)]
                for first in chunks:
                    count = sizes[begins.index(first)]
                    got = await answer(sequence, first, values[first : first + count])
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
        sequence = Sequence(engine, MODEL, 0, None, Repeatable(), Call())
        values = values_of(2 * (REPEATABLE + 2))
        for first in range(0, len(values), 2):
            await answer(sequence, first, values[first : first + 2])
        step, state = sequence.step, sequence.state
        wrong = [
            (step + 1, values[:2], f"goes on at step {step}"),
            (step - 1, values[:2], f"goes on at step {step}"),
            (step - 2, values[:2], "in a chunk of other values"),
            (step - 2, values[-2:-1], "in a chunk of other values"),
            (0, values[:2], f"again one of the last {REPEATABLE} chunks"),
        ]
        for first, chunk, says in wrong:
            with pytest.raises(SequenceStateError, match=says):
                await answer(sequence, first, chunk)
        assert (sequence.step, sequence.state) == (step, state)
    finally:
        await asyncio.to_thread(engine.close)


async def test_a_chunk_of_many_pieces_has_the_bits_of_one_and_one_that_is_left_changes_nothing() -> None:
    engine = new_engine()
    try:
        sequence = Sequence(engine, MODEL, 0, None, Repeatable(), Call())
        values = values_of(3 * PIECE + 5)
        reader = Answer(sequence)
        sequence.start(0, values, reader)
        sequence.leave()
        assert (sequence.step, sequence.state) == (0, None)
        got = await answer(sequence, 0, values)
        assert got.tobytes() == alone(MODEL, values, None)[1].tobytes()
        assert not reader.done.done()
        assert sequence.step == len(values)
    finally:
        await asyncio.to_thread(engine.close)


async def test_a_stream_s_latest_chunks_can_be_repeated_over_all_its_sequences() -> None:
    engine = new_engine()
    try:
        shared = Repeatable()
        sequences = [Sequence(engine, MODEL, 0, None, shared, Call()) for _ in range(REPEATABLE + 3)]
        values = values_of(2)
        answers = [await answer(sequence, 0, values) for sequence in sequences]
        for sequence in sequences[:3]:
            with pytest.raises(SequenceStateError, match="0, the sequence goes on at step 2"):
                await answer(sequence, 0, values)
        for sequence, before in zip(sequences[3:], answers[3:], strict=True):
            assert (await answer(sequence, 0, values)).tobytes() == before.tobytes()
    finally:
        await asyncio.to_thread(engine.close)


async def test_what_is_kept_of_a_stream_s_latest_chunks_keeps_no_sequence_that_ended() -> None:
    engine = new_engine()
    try:
        repeatable = Repeatable()
        await answer(Sequence(engine, MODEL, 0, None, repeatable, Call()), 0, values_of(3))
        gc.collect()
        assert not [each for each in gc.get_objects() if type(each) is Sequence and each._repeatable is repeatable]
    finally:
        await asyncio.to_thread(engine.close)
