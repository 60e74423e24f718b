"""The engine in process: bits, states, threads, event loops, and errors that name the sequence."""

import asyncio
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import ArrayLike
from support import bundles
from support.models import alone, random_classifier, random_network, served
from support.values import random_values

from unroll_engine import BundleError, Engine, InternalError, InvalidRequestError, SequenceStateError, Snapshot
from unroll_engine.models.loader import Model
from unroll_engine.models.spec import Float32Array, State
from unroll_engine.runtimes.base import TickResult, Values

MODELS = [
    served(random_network(), "one"),
    served(random_network(layers=2), "two"),
    served(random_network(outputs=1)),
    served(random_classifier("lstm", layers=2), "lstm"),
    served(random_classifier("gru"), "gru"),
    served(random_classifier("rnn", nonlinearity="relu"), "relu"),
]
MODEL = MODELS[0]


@settings(max_examples=40)
@given(
    model=st.sampled_from(MODELS),
    lengths=st.lists(st.integers(1, 150), max_size=9),
    cut=st.floats(0, 1),
    lanes=st.integers(1, 5),
)
def test_a_sequence_has_the_bits_that_it_has_alone_in_any_batch_and_resumed_anywhere(
    model: Model, lengths: list[int], cut: float, lanes: int
) -> None:
    sequences = [random_values(steps, seed) for seed, steps in enumerate(lengths)]
    with Engine(model, max_lanes=lanes) as engine:
        result = engine.classify(sequences, return_final_states=True)
        assert len(result) == len(result.labels) == len(result.label_indices) == len(result.probabilities)
        for index, values in enumerate(sequences):
            logits, states, final = alone(model, values, None)
            assert result.logits[index].tobytes() == logits[-1].tobytes()
            assert result.labels[index] == model.spec.class_labels[result.label_indices[index]]
            assert result.final_states is not None
            assert result.final_states[index].data == tuple(array.tobytes() for array in final)
            assert result.final_states[index].step == len(values)
            split = int(cut * (len(values) - 1))
            sequence = engine.open()
            if split:
                first = sequence.advance(values[:split])
                assert (first.first_step, first.states.tobytes()) == (0, states[:split].tobytes())
            kept = sequence.snapshot()
            for _ in range(2):  # a snapshot can be resumed any number of times
                resumed = engine.open(Snapshot.from_bytes(kept.to_bytes()))
                rest = resumed.advance(values[split:])
                assert (rest.first_step, len(rest), resumed.step) == (split, len(values) - split, len(values))
                assert rest.states.tobytes() == states[split:].tobytes()
                assert rest.logits.tobytes() == logits[split:].tobytes()
            batch = engine.classify([values[split:]] * 2, initial_states=[kept, None], return_final_states=True)
            assert batch.logits[0].tobytes() == logits[-1].tobytes()
            assert batch.final_states is not None
            assert [state.step for state in batch.final_states] == [len(values), len(values) - split]


def test_threads_change_no_bit() -> None:
    model = served(random_network(hidden=256))
    sequences = [random_values(1 + index % 60, index) for index in range(400)]
    one, three = (Engine(model, threads=threads).classify(sequences, return_final_states=True) for threads in (1, 3))
    assert one.logits.tobytes() == three.logits.tobytes()
    assert one.final_states == three.final_states
    with pytest.raises(ValueError, match="threads: 1 or more expected, got 0"):
        Engine(model, threads=0)


def test_one_array_is_a_batch_and_any_numeric_type_will_do() -> None:
    engine = Engine(MODEL)
    batch = np.stack([random_values(7, seed) for seed in range(3)])
    expected = engine.classify(list(batch))
    assert engine.classify(batch).logits.tobytes() == expected.logits.tobytes()
    wide = engine.classify(batch.astype(np.float64)[:, :, ::-1][:, :, ::-1].tolist())
    assert wide.logits.tobytes() == expected.logits.tobytes()


@pytest.mark.parametrize(
    ("sequence", "problem"),
    [
        ([[1.0, 2.0, np.nan]], "step 0, feature 2 is not a finite float32"),
        ([[0.0, 0.0, 0.0], [0.0, 1e39, 0.0]], "step 1, feature 1 is not a finite float32"),
        ([[1.0, 2.0]], r"shape \[1, 2\], \[steps, 3\] with 1 step or more expected"),
        ([1.0, 2.0, 3.0], r"shape \[3\], .*; one sequence of a batch is \[steps, features\]"),
        (np.empty((0, 3)), r"shape \[0, 3\]"),
        ([[1.0, 2.0, 3.0], [1.0]], "rows of unequal lengths"),
        ([["a", "b", "c"]], "dtype <U1, numbers expected"),
    ],
)
def test_a_value_that_cant_be_used_is_refused_by_a_value_error_that_names_its_sequence(
    sequence: ArrayLike, problem: str
) -> None:
    engine = Engine(MODEL)
    with pytest.raises(ValueError, match=rf"^sequences\[1\]: {problem}"):
        engine.classify([random_values(2), sequence])
    opened = engine.open()
    with pytest.raises(InvalidRequestError, match=f"^chunk: {problem}"):
        opened.advance(sequence)
    assert opened.step == 0


def test_values_that_overflow_fail_their_sequence_alone_and_leave_it_as_it_was() -> None:
    network = random_network()
    network.std.fill_(0.1)
    model = served(network)
    engine = Engine(model)
    # Infinite after standardization, and the difference of two infinities is NaN.
    huge = np.full((2, 3), 3e38, np.float32)
    with pytest.raises(InvalidRequestError, match="values of sequence 1 are so large"):
        engine.classify([random_values(3), huge])
    opened = engine.open()
    with pytest.raises(InvalidRequestError, match="so large"):
        opened.advance(np.concatenate([huge, random_values(100)]))
    assert opened.advance(random_values(5)).states.tobytes() == alone(model, random_values(5), None)[1].tobytes()


def test_states_must_be_of_the_model_and_one_a_sequence() -> None:
    engine, other = Engine(MODEL), Engine(MODELS[1])
    theirs = other.open().snapshot()
    with pytest.raises(SequenceStateError, match=r"^initial_states\[1\]: the snapshot is of two/1"):
        engine.classify([random_values(2)] * 2, initial_states=[None, theirs])
    with pytest.raises(SequenceStateError, match=r"^snapshot: the snapshot is of two/1"):
        engine.open(theirs)
    with pytest.raises(InvalidRequestError, match=r"^initial_states: 1 for 2 sequences"):
        engine.classify([random_values(2)] * 2, initial_states=[None])


def test_no_sequences_make_no_classes() -> None:
    result = Engine(MODEL).classify([], return_final_states=True)
    assert (result.labels, result.final_states, result.probabilities.shape) == ([], (), (0, 4))


async def test_it_works_within_a_running_event_loop_and_without_blocking_it() -> None:
    sequences = [random_values(steps, steps) for steps in (5, 40, 3)]
    with Engine(MODEL) as engine:
        expected = engine.classify(sequences)
        answers = await asyncio.gather(*(engine.aclassify(sequences) for _ in range(5)))
        assert all(answer.logits.tobytes() == expected.logits.tobytes() for answer in answers)
        opened = engine.open()
        steps = await opened.aadvance(sequences[1])
        assert steps.logits[-1].tobytes() == expected.logits[1].tobytes()


class Gated:
    """A runtime that waits for permission before each run, and raises given errors."""

    name, device, artifact, bitwise, variant = "onnx", "cpu", "gated", True, ""

    def __init__(self) -> None:
        self.entered, self.gate = threading.Semaphore(0), threading.Semaphore(0)
        self.lanes: list[int] = []
        self.raises: BaseException | None = None

    def run(self, x: Float32Array, state: State) -> TickResult[Values]:
        self.lanes.append(x.shape[1])
        self.entered.release()
        assert self.gate.acquire(timeout=60)
        if self.raises:
            raise self.raises
        return MODEL.runtime.run(x, state)


async def test_calls_of_several_threads_share_ticks() -> None:
    runtime = Gated()
    engine = Engine(served(random_network(), "m", runtime=runtime))
    first = asyncio.create_task(engine.aclassify([random_values(30_000)]))
    await asyncio.to_thread(runtime.entered.acquire)
    others = [asyncio.create_task(engine.aclassify([random_values(30_000, seed)])) for seed in range(1, 4)]
    while runtime.lanes[-1] < 4:
        runtime.gate.release()
        await asyncio.to_thread(runtime.entered.acquire)
    runtime.gate.release(10_000)
    answers = await asyncio.gather(first, *others)
    for seed, answer in enumerate(answers):
        assert answer.logits.tobytes() == alone(MODEL, random_values(30_000, seed), None)[0][-1:].tobytes()


async def test_a_cancelled_call_leaves_its_sequence_as_it_was_and_the_engine_free() -> None:
    runtime = Gated()
    engine = Engine(served(random_network(), "m", runtime=runtime))
    opened = engine.open()
    task = asyncio.create_task(opened.aadvance(random_values(500)))
    await asyncio.to_thread(runtime.entered.acquire)
    with pytest.raises(SequenceStateError, match="is being advanced"):
        opened.advance(random_values(1))
    task.cancel()
    await asyncio.wait({task})
    assert (task.cancelled(), opened.step) == (True, 0)
    runtime.gate.release(1000)
    steps = await opened.aadvance(random_values(5))
    assert steps.states.tobytes() == alone(MODEL, random_values(5), None)[1].tobytes()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_interrupt_in_a_tick_loses_nothing_but_the_calls_in_it() -> None:
    runtime = Gated()
    engine = Engine(served(random_network(), "m", runtime=runtime))
    runtime.gate.release(1000)
    runtime.raises = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        engine.classify([random_values(3), random_values(5)])
    runtime.raises = None
    answer = engine.classify([random_values(3), random_values(5)])
    assert answer.logits[0].tobytes() == alone(MODEL, random_values(3), None)[0][-1].tobytes()


def test_a_failing_runtime_fails_the_call_and_not_the_next() -> None:
    runtime = Gated()
    engine = Engine(served(random_network(), "m", runtime=runtime))
    runtime.gate.release(1000)
    runtime.raises = RuntimeError("no device")
    with pytest.raises(InternalError, match="the model's runtime failed"):
        engine.classify([random_values(3)])
    with pytest.raises(InternalError, match="the model's runtime failed"):
        engine.open().advance(random_values(3))
    runtime.raises = None
    assert len(engine.classify([random_values(3)])) == 1


def test_a_closed_engine_says_so() -> None:
    with Engine(MODEL) as engine:
        opened = engine.open()
    for call in (lambda: engine.classify([random_values(1)]), lambda: opened.advance(random_values(1))):
        with pytest.raises(RuntimeError, match="the engine is closed"):
            call()


def test_it_loads_a_bundle_a_model_s_newest_version_and_a_repository_with_one_model(tmp_path: Path) -> None:
    root = tmp_path / "models"
    first = bundles.export(random_network(), root)
    bundles.publish(first, root, "m", 10)
    for path, version in ((first, 1), (root / "m", 10), (root, 10)):
        with Engine.load(path) as engine:
            assert (engine.spec.key, engine.bitwise) == (("m", version), True)
            assert len(engine.classify([random_values(4)])) == 1
    moved = tmp_path / "anywhere"
    first.rename(moved)
    assert Engine.load(str(moved)).spec.key == ("m", 1)
    bundles.publish(moved, root, "other", 1)
    with pytest.raises(BundleError, match=r"several models \(m, other\): name one, such as .*models/m$"):
        Engine.load(root)
    (tmp_path / "empty").mkdir()
    for path, problem in ((tmp_path / "empty", "no bundle"), (tmp_path / "none", "No such file")):
        with pytest.raises(BundleError, match=problem):
            Engine.load(path)
    (moved / "model.onnx").write_bytes(b"not what was proven")
    with pytest.raises(BundleError, match=r"model\.onnx"):
        Engine.load(moved)
