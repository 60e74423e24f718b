"""The step kernel from Python: correct results, the same bits in any schedule, and clear refusals."""

import itertools
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.recurrent import CELLS, Float32Array, random_sequences, recurrent_network

from unroll_engine.kernel import Network, Outcome, SequenceQueue, isas, pack, read_onnx, unavailable_reason
from unroll_engine.kernel.exact import ExactNetwork

pytestmark = pytest.mark.skipif(unavailable_reason() is not None, reason=f"kernel: {unavailable_reason()}")


def network(cell: str = "rnn_tanh", inputs: int = 3, hidden: int = 20, outputs: int = 4, layers: int = 2) -> Network:
    return Network(read_onnx(recurrent_network(cell, inputs, hidden, outputs, layers).to_onnx()))


@dataclass
class Sequence:
    """Arrays of one sequence: values, initial state, and results."""

    x: Float32Array
    state: tuple[Float32Array, ...]
    outputs: int
    final: tuple[Float32Array, ...] = field(init=False)
    states: Float32Array = field(init=False)
    logits: Float32Array = field(init=False)

    def __post_init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.final = tuple(np.full_like(tensor, np.nan) for tensor in self.state)
        self.states = np.full((len(self.x), self.state[0].shape[1]), np.nan, np.float32)
        self.logits = np.full((len(self.x), self.outputs), np.nan, np.float32)

    def results(self) -> list[bytes]:
        return [array.tobytes() for array in (*self.final, self.states, self.logits)]

    def run(self, network: Network) -> list[bytes]:
        self.clear()
        network.run_one(self.x, self.state, final_state=self.final, states=self.states, logits=self.logits)
        return self.results()

    def submit(self, queue: SequenceQueue, deadline: float | None = None) -> int:
        return queue.submit(
            self.x, self.state, final_state=self.final, states=self.states, logits=self.logits, deadline=deadline
        )


def sequences(cell: str, lengths: list[int], hidden: int = 20, outputs: int = 4, layers: int = 2) -> list[Sequence]:
    made = []
    for index, steps in enumerate(lengths):
        values, state = random_sequences(recurrent_network(cell, 3, hidden, outputs, layers), steps, 1, seed=index)
        made.append(Sequence(values[:, 0], tuple(tensor[:, 0] for tensor in state), outputs))
    return made


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize(("hidden", "layers"), [(37, 1), (128, 1), (16, 3)])
def test_each_step_is_as_near_to_float64_as_float32_allows(cell: str, hidden: int, layers: int) -> None:
    reference = recurrent_network(cell, 12, hidden, 9, layers, seed=hidden)
    weights = read_onnx(reference.to_onnx())
    kernel, exact = Network(weights), ExactNetwork.of(weights)
    x, initial = random_sequences(reference, 64, 5)
    logits, states, final = kernel.run(x, initial)
    state = initial
    for step, values in enumerate(x):
        expected = exact.step(exact.inputs(values), state)
        _, _, state = kernel.run(values[None], state)
        for got, near in ((logits[step], exact.logits(states[step])), *zip(state, expected, strict=True)):
            assert (np.abs(got - near.value) <= near.off).all()
        assert states[step].tobytes() == state[0][-1].tobytes()
    assert [tensor.tobytes() for tensor in final] == [tensor.tobytes() for tensor in state]


@pytest.mark.parametrize("cell", CELLS)
def test_one_sequence_lanes_and_queue_give_the_same_bits_on_every_instruction_set(cell: str) -> None:
    weights = read_onnx(recurrent_network(cell, 3, 20, 4, 2).to_onnx())
    x, state = random_sequences(recurrent_network(cell, 3, 20, 4, 2), 7, 31)
    lanes = [Sequence(x[:, lane], tuple(tensor[:, lane] for tensor in state), 4) for lane in range(31)]
    digests = set()
    for isa in isas():
        kernel = Network(weights, isa)
        assert kernel.isa == isa
        alone = [lane.run(kernel) for lane in lanes]
        logits, states, final = kernel.run(x, state)
        for lane, expected in enumerate(alone):
            parts = [*(tensor[:, lane] for tensor in final), states[:, lane], logits[:, lane]]
            assert [np.ascontiguousarray(part).tobytes() for part in parts] == expected
        last, end = kernel.run_to_end(x, state)
        assert (last.tobytes(), *(tensor.tobytes() for tensor in end)) == (
            logits[-1].tobytes(),
            *(tensor.tobytes() for tensor in final),
        )
        queue = SequenceQueue(kernel, slots=5)
        for sequence in lanes:
            sequence.clear()
            sequence.submit(queue)
        while len(queue):
            queue.advance(13)
        assert [lane.results() for lane in lanes] == alone
        digests.add(tuple(b"".join(result) for result in alone))
    assert len(digests) == 1


def test_a_state_is_advanced_in_place_and_the_cut_does_not_show() -> None:
    kernel, (sequence,) = network(), sequences("rnn_tanh", [9])
    expected = sequence.run(kernel)
    state = tuple(tensor.copy() for tensor in sequence.state)
    last = np.empty(4, np.float32)
    for begin, end in ((0, 1), (1, 6), (6, 9)):
        kernel.run_one(sequence.x[begin:end], state, final_state=state, logits=last)
    assert [tensor.tobytes() for tensor in state] == expected[:-2]
    assert last.tobytes() == sequence.logits[-1].tobytes()
    zeros = tuple(np.zeros_like(tensor) for tensor in state)
    from_zeros, from_nothing = np.empty((2, 4), np.float32)
    kernel.run_one(sequence.x, zeros, logits=from_zeros)
    kernel.run_one(sequence.x, logits=from_nothing)
    assert from_zeros.tobytes() == from_nothing.tobytes()


@pytest.mark.parametrize("cell", CELLS)
def test_nan_and_infinity_stay_in_their_own_sequence(cell: str) -> None:
    reference = recurrent_network(cell, 3, 20, 4)
    kernel = Network(read_onnx(reference.to_onnx()))
    x, state = random_sequences(reference, 4, 3)
    clean = kernel.run(x, state)[1]
    x[1, 0, 1], x[1, 1, 1] = np.nan, np.inf
    states = kernel.run(x, state)[1]
    assert np.isnan(states[1:, 0]).all()
    assert states[:, 2].tobytes() == clean[:, 2].tobytes()
    if cell == "rnn_tanh":
        assert set(np.abs(states[1, 1])) == {1.0}


def test_threads_share_a_queue() -> None:
    kernel, lengths = network(hidden=64), [1 + index % 50 for index in range(200)]
    batch = sequences("rnn_tanh", lengths, hidden=64)
    expected = [sequence.run(kernel) for sequence in batch]
    for sequence in batch:
        sequence.clear()
    queue, steps = SequenceQueue(kernel, slots=8, threads=3), 0
    tickets = {sequence.submit(queue) for sequence in batch}
    ended: list[int] = []
    for budget in itertools.cycle([40, 2**62, 1, 3000]):
        progress = queue.advance(budget)
        steps += progress.steps
        ended.extend(each.ticket for each in progress.ended)
        if not len(queue):
            break
    assert sorted(ended) == sorted(tickets)
    assert steps == sum(lengths)
    assert [sequence.results() for sequence in batch] == expected


@given(st.lists(st.integers(2, 40), max_size=8), st.integers(1, 20), st.data())
def test_arrays_are_packed_if_none_needs_a_conversion(lengths: list[int], features: int, data: st.DataObject) -> None:
    arrays: list[Any] = [np.random.default_rng(length).random((length, features), np.float32) for length in lengths]
    packed = pack(tuple(arrays), features)
    assert packed is not None
    assert packed[0].shape == (sum(lengths), features)
    assert packed[0].tobytes() == b"".join(arrays)
    assert packed[1].tolist() == list(itertools.accumulate(lengths, initial=0))
    if not arrays:
        return
    place = data.draw(st.integers(0, len(arrays) - 1))
    right = arrays[place]
    spoiled, twice = right.copy(), np.hstack([right, right])
    spoiled.flat[data.draw(st.integers(0, right.size - 1))] = data.draw(st.sampled_from([np.nan, np.inf, -np.inf]))
    misplaced = np.frombuffer(b"." + right.tobytes(), np.float32, right.size, 1).reshape(right.shape)
    converted = [right.astype(kind) for kind in (np.float64, np.int32, ">f4")]
    for wrong in (
        spoiled,
        misplaced,
        *converted,
        right[:0],
        right[0],
        right[None],
        twice,
        twice[:, :features],
        [[1.0]],
    ):
        arrays[place] = wrong
        assert pack(tuple(arrays), features) is None


def test_a_forked_child_has_threads_of_its_own() -> None:
    # In a process of its own: a fork of one with threads is a warning in newer Pythons.
    code = """
import os, sys
import numpy as np
from unroll_engine.kernel import Network, NetworkWeights, SequenceQueue
from unroll_engine.kernel.weights import LayerWeights

def floats(*shape):
    return np.full(shape, 0.01, np.float32)

layer = LayerWeights(floats(128, 8), floats(128, 128), floats(128))
network = Network(NetworkWeights("rnn_tanh", None, (layer,), floats(4, 128), floats(4)))
values, offsets, logits = floats(20_000, 8), list(range(0, 20_001, 100)), floats(200, 4)

def steps(queue):
    queue.submit_batch(values, offsets, 0, None, None, logits)
    return queue.advance(2**62).steps

queue = SequenceQueue(network, threads=2)
assert steps(queue) == 20_000
if not (child := os.fork()):
    done = steps(queue), steps(SequenceQueue(network, threads=2))
    os._exit(0 if done == (20_000, 20_000) else 1)
assert steps(queue) == 20_000
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=60)


def test_a_deadline_or_a_cancellation_ends_a_sequence_between_budgets() -> None:
    kernel = network()
    late, cancelled, waiting, kept = sequences("rnn_tanh", [30, 30, 30, 30])
    queue = SequenceQueue(kernel, slots=2)
    tickets = [
        late.submit(queue, deadline=time.monotonic() - 1),
        cancelled.submit(queue),
        kept.submit(queue, deadline=time.monotonic() + 3600),
        waiting.submit(queue),
    ]
    assert queue.advance(10).ended == [(tickets[0], Outcome.EXPIRED, 1)]
    assert queue.cancel(tickets[1])
    assert queue.cancel(tickets[3])
    outcomes = {each.ticket: each.outcome for each in queue.advance(1000).ended}
    assert outcomes == {tickets[1]: Outcome.CANCELLED, tickets[2]: Outcome.DONE, tickets[3]: Outcome.CANCELLED}
    assert not queue.cancel(tickets[1])
    assert kept.results() == kept.run(kernel)
    assert len(queue) == 0
    assert queue.advance(1) == (0, [])


def test_a_budget_bounds_a_turn() -> None:
    queue = SequenceQueue(network(), slots=3)
    for sequence in sequences("rnn_tanh", [100] * 5):
        sequence.submit(queue)
    steps = [queue.advance(20).steps for _ in range(3)]
    assert all(20 <= each < 23 for each in steps)


@pytest.mark.parametrize("cell", CELLS)
def test_sequences_of_a_batch_share_a_ticket_and_run_in_rounds(cell: str) -> None:
    kernel = network(cell)
    reference = recurrent_network(cell, 3, 20, 4, 2)
    values, state = random_sequences(reference, 30, 4)
    rows, offsets = np.ascontiguousarray(values[:, 0]), [0, 5, 6, 30]
    expected = np.empty((4, 4), np.float32)
    for index, (begin, end) in enumerate(itertools.pairwise(offsets)):
        kernel.run_one(rows[begin:end], tuple(tensor[:, index + 1] for tensor in state), logits=expected[index + 1])
    queue, logits = SequenceQueue(kernel), np.zeros((4, 4), np.float32)
    final = tuple(np.empty_like(tensor) for tensor in state)
    ticket = queue.submit_batch(rows, offsets, 1, state, final, logits)
    assert len(queue) == 3
    assert queue.advance(1000, rounds=4) == (4 + 1 + 4, [(ticket, Outcome.DONE, 1)])
    assert queue.advance(1000, rounds=1) == (2, [(ticket, Outcome.DONE, 1)])
    assert queue.cancel(ticket)
    assert queue.advance(1000) == (0, [(ticket, Outcome.CANCELLED, 1)])
    assert logits[1:3].tobytes() == expected[1:3].tobytes()
    assert not logits[[0, 3]].any()
    for bad in ([-1, 4], [0, 31], [3, 3], [5, 2]):
        with pytest.raises(ValueError, match=r"^(offsets|x): from "):
            queue.submit_batch(rows, bad, 0, state, final, logits)
    with pytest.raises(ValueError, match="first: 3 sequences from 2 are not among 4"):
        queue.submit_batch(rows, offsets, 2, state, final, logits)
    assert len(queue) == 0


@pytest.mark.parametrize("cell", CELLS)
def test_every_step_of_a_batch_can_be_had(cell: str) -> None:
    kernel = network(cell)
    reference = recurrent_network(cell, 3, 20, 4, 2)
    values, state = random_sequences(reference, 30, 3)
    rows, offsets = np.ascontiguousarray(values[:, 0]), [0, 5, 6, 30]
    expected = np.empty((30, 4), np.float32), np.empty((30, 20), np.float32)
    final, last = [tuple(np.empty_like(tensor) for tensor in state) for _ in range(2)]
    for index, (begin, end) in enumerate(itertools.pairwise(offsets)):
        own, own_last = [tuple(tensor[:, index] for tensor in each) for each in (state, last)]
        logits, states = [array[begin:end] for array in expected]
        kernel.run_one(rows[begin:end], own, final_state=own_last, states=states, logits=logits)
    queue, logits, states = SequenceQueue(kernel), np.zeros((30, 4), np.float32), np.zeros((30, 20), np.float32)
    ticket = queue.submit_batch(rows, offsets, 0, state, final, logits, states)
    assert queue.advance(1000) == (30, [(ticket, Outcome.DONE, 3)])
    assert [logits.tobytes(), states.tobytes()] == [each.tobytes() for each in expected]
    assert [tensor.tobytes() for tensor in final] == [tensor.tobytes() for tensor in last]
    with pytest.raises(ValueError, match="final_state: expected with states"):
        queue.submit_batch(rows, offsets, 0, state, None, logits, states)
    with pytest.raises(ValueError, match="logits: "):
        queue.submit_batch(rows, offsets, 0, state, final, logits[:3], states)


def test_a_queue_keeps_the_arrays_of_its_sequences() -> None:
    kernel, queue = network(), SequenceQueue(network())
    values, logits = np.ones((5, 3), np.float32), np.empty(4, np.float32)
    before = sys.getrefcount(values)
    queue.submit(values, logits=logits)
    queue.submit(values.copy(), logits=np.empty(4, np.float32))  # no other references to these
    assert sys.getrefcount(values) > before
    queue.advance(100)
    assert sys.getrefcount(values) == before
    expected = np.empty(4, np.float32)
    kernel.run_one(values, logits=expected)
    assert logits.tobytes() == expected.tobytes()


X = np.zeros((5, 3), np.float32)
H = (np.zeros((2, 20), np.float32),)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda k: k.run_one(X.astype(np.float64)), TypeError, "x: float32 expected"),
        (lambda k: k.run_one(X[0]), ValueError, "x: shape [3], [any, 3] expected"),
        (lambda k: k.run_one(X[:, :2]), ValueError, "x: shape [5, 2], [any, 3] expected"),
        (lambda k: k.run_one(X[:0]), ValueError, "x: from 1 to 2^31 timesteps expected, got 0"),
        (lambda k: k.run_one(np.zeros((5, 6), np.float32)[:, ::2]), ValueError, "x: its last axis must be contiguous"),
        (lambda k: k.run_one(X, H * 2), ValueError, "state: 2 tensors, 1 expected"),
        (lambda k: k.run_one(X, (H[0][:1],)), ValueError, "state: shape [1, 20], [2, 20] expected"),
        (lambda k: k.run_one(X, final_state=(H[0].T,)), ValueError, "final_state: shape [20, 2], [2, 20] expected"),
        (lambda k: k.run_one(X, logits=np.zeros(5, np.float32)), ValueError, "logits: shape [5], [4] expected"),
        (
            lambda k: k.run_one(X, logits=np.zeros((4, 4), np.float32)),
            ValueError,
            "logits: shape [4, 4], [5, 4] expected",
        ),
        (
            lambda k: k.run_one(X, states=np.zeros((5, 21), np.float32)),
            ValueError,
            "states: shape [5, 21], [5, 20] expected",
        ),
        (
            lambda k: k.run_one(np.frombuffer(bytes(61), np.uint8)[1:].view(np.float32).reshape(5, 3)),
            ValueError,
            "x: not aligned to 4 bytes; copy it",
        ),
        (lambda k: k.run(X[:, None], (H[0],)), ValueError, "state: shape [2, 20], [2, 1, 20] expected"),
        (lambda k: k.run(X[:, None][:, :0], (H[0][:, None][:, :0],)), ValueError, "x: at least one lane expected"),
        (lambda k: SequenceQueue(k, slots=0), ValueError, "slots: from 1 to 4096 expected, got 0"),
        (lambda k: SequenceQueue(k, threads=0), ValueError, "threads: from 1 to 1024 expected, got 0"),
        (lambda k: SequenceQueue(k).advance(0), ValueError, "budget: at least 1 step expected, got 0"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(
    call: Callable[[Network], object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error) as raised:
        call(network())
    assert str(raised.value) == message


def test_results_are_not_written_into_read_only_arrays() -> None:
    logits = np.zeros(4, np.float32)
    logits.flags.writeable = False
    with pytest.raises(TypeError):
        network().run_one(X, logits=logits)
    assert not logits.any()


def test_an_unknown_instruction_set_is_refused() -> None:
    with pytest.raises(ValueError, match=rf"isa: vax; this CPU has .*{isas()[0]}"):
        Network(read_onnx(recurrent_network("rnn_tanh", 3, 4, 2).to_onnx()), "vax")


@settings(max_examples=60)
@given(data=st.data(), cell=st.sampled_from(CELLS), slots=st.integers(1, 9))
def test_whatever_is_done_to_a_queue_its_sequences_end_as_alone(data: st.DataObject, cell: str, slots: int) -> None:
    kernel = network(cell, hidden=5)
    queue = SequenceQueue(kernel, slots=slots)
    live: dict[int, Sequence] = {}
    doomed: set[int] = set()

    def advance(budget: int) -> None:
        for ticket, outcome, _ in queue.advance(budget).ended:
            sequence = live.pop(ticket)
            assert (outcome is not Outcome.DONE) == (ticket in doomed)
            if outcome is Outcome.DONE:
                got = sequence.results()
                assert got == sequence.run(kernel)

    for action in data.draw(
        st.lists(st.sampled_from(["submit", "expired", "cancel", "advance", "invalid"]), max_size=40)
    ):
        if action in ("submit", "expired"):
            (sequence,) = sequences(cell, [data.draw(st.integers(1, 12))], hidden=5)
            ticket = sequence.submit(queue, deadline=1e-9 if action == "expired" else None)
            live[ticket] = sequence
            doomed |= {ticket} if action == "expired" else set()
        elif action == "cancel":
            ticket = data.draw(st.sampled_from([*live, -1, 2**62]))
            assert queue.cancel(ticket) == (ticket in live)
            doomed.add(ticket)
        elif action == "advance":
            advance(data.draw(st.one_of(st.integers(1, 30), st.just(2**62))))
        else:
            shape = data.draw(st.lists(st.integers(0, 6), min_size=1, max_size=3))
            if len(shape) != 2 or shape[1] != 3 or shape[0] == 0:
                with pytest.raises(ValueError, match="x: "):
                    queue.submit(np.zeros(shape, np.float32))
        assert len(queue) == len(live)
    while live:
        advance(7)
