"""Proves a step graph: compares its bits with the original file's, at every batch size, position and cut."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unroll_engine.models.spec import Float32Array, State
from unroll_engine.runtimes.step import StepRuntime
from unroll_engine.runtimes.step_session import step_session
from unroll_export.parity.runners import ParityError
from unroll_export.steps.folding import initial_batch
from unroll_export.steps.plan import Plan
from unroll_export.steps.reading import Source
from unroll_proto import bundle, step_model
from unroll_proto.v1 import bundle_pb2 as pb

LANES = 80
"""Sequences of the widest batch of the proof: a server's widest tick."""
STEPS = 12
CASES = 69
"""Cases of a proof, with the run of the file before them."""
NEAR = 1e-5
"""Difference, relative to values above 1, that another order of float32 sums can make in a step."""
FAR = 1e-3
"""Difference from which on sequences of a batch do not only round differently: they depend on each other."""

OnCase = Callable[[str], None]


Steps = Callable[[Float32Array], tuple[Float32Array, NDArray[np.float64]]]
"""Function of values [steps, input_size] of a sequence; returns outputs [steps, output_size] and its state after
each step, [steps, values]."""


@dataclass(slots=True)
class _Case:
    """Differences of one case of the proof."""

    name: str
    batch: int
    differences: int = 0
    worst: float = 0.0
    where: str = field(default="", repr=False)

    def compare(self, found: NDArray[Any], expected: NDArray[Any], where: str) -> None:
        """Counts the values whose bits differ, and measures the largest difference relative to values above 1."""
        different = found.view(np.uint8) != expected.view(np.uint8)
        if not different.any():
            return
        self.differences += int(different.reshape(found.size, -1).any(axis=1).sum())
        scale = np.maximum(np.abs(expected.astype(np.float64)), 1)
        worst = float((np.abs(found.astype(np.float64) - expected) / scale).max(initial=0.0))
        if not worst <= self.worst:
            self.worst, self.where = worst, where


@dataclass(frozen=True, slots=True)
class Proven:
    """The proof of a step graph.

    Attributes:
        proof: Proof for the bundle's parity.json.
        bitwise: True if no bit differs in any case.
        note: Text of the differences; empty if there are none.
        probabilities: True if the values of the first output are probabilities in every step.
    """

    proof: pb.ArtifactProof
    bitwise: bool
    note: str
    probabilities: bool


def source_steps(source: Source, plan: Plan) -> Steps:
    """Computes the steps of one sequence by the original file, in a separate loop."""
    session = step_session(source.model.SerializeToString())
    own = [state for state in plan.states if not state.context_of]
    names = [*plan.outputs, *(state.next for state in own if state.next)]

    def run(values: Float32Array) -> tuple[Float32Array, NDArray[np.float64]]:
        feeds: dict[str, NDArray[Any]] = dict(plan.constants)
        contexts: dict[str, NDArray[Any]] = {}
        for state in plan.states:
            initial = initial_batch(state.tensor, state.initial, 1)
            if state.context_of:
                contexts[state.context_of] = initial
            else:
                feeds[state.tensor.name] = initial
        outputs, after = [], []
        for row in values:
            begin = 0
            for tensor in plan.inputs:
                part = row[begin : begin + tensor.size].reshape(tensor.batch_dims(1)).astype(tensor.dtype)
                begin += tensor.size
                if tensor.name in contexts:
                    context = contexts[tensor.name]
                    part = np.concatenate([context, part], axis=-1)
                    contexts[tensor.name] = part[..., part.shape[-1] - context.shape[-1] :]
                feeds[tensor.name] = part
            found = dict(zip(names, session.run(names, feeds), strict=True))
            outputs.append(np.concatenate([found[name].astype(np.float32).reshape(-1) for name in plan.outputs]))
            feeds |= {state.tensor.name: found[state.next] for state in own if state.next}
            whole = [
                contexts[state.context_of] if state.context_of else feeds[state.tensor.name] for state in plan.states
            ]
            after.append(np.concatenate([array.astype(np.float64).reshape(-1) for array in whole]))
        return np.stack(outputs), np.stack(after)

    return run


def own_steps(runtime: StepRuntime, step: pb.StepModel) -> Steps:
    """Computes the steps of one sequence by the step graph itself, if there is no source."""

    def run(values: Float32Array) -> tuple[Float32Array, NDArray[np.float64]]:
        state, outputs, after = initial_state(step, 1), [], []
        for row in values:
            result = runtime.run(row[np.newaxis, np.newaxis], state)
            state = result.final_state
            outputs.append(result.logits[0, 0])
            after.append(flat(state, 0))
        return np.stack(outputs), np.stack(after)

    return run


def prove(content: bytes, step: pb.StepModel, reference: Steps, on_case: OnCase = lambda _: None) -> Proven:
    """Compares a step graph, as served, with the steps of single sequences.

    Args:
        content: The step graph.
        step: Its description; `bitwise` is ignored.
        reference: Computes the steps of a sequence.
        on_case: Called with each case before it is run.

    Raises:
        ParityError: it computes other results, or sequences of a batch depend on each other.
    """
    trial = _Trial(StepRuntime(content, step), step, reference, on_case)
    cases = [trial.alone()]
    sizes = (2,) if step.alone else (*range(2, 65), LANES)
    cases += [trial.batch(range(size), f"batch of {size}") for size in sizes]
    rng = np.random.default_rng(2)
    for size in (sizes[-1], sizes[len(sizes) // 2]):
        cases.append(trial.batch(rng.permutation(LANES)[:size].tolist(), f"batch of {size}, other places"))
    cases.append(trial.staggered(min(sizes[-1], 48)))
    same, *together = cases
    if not same.worst <= NEAR:
        raise ParityError(f"the step graph doesn't compute what the file does: {same.where} (off by {same.worst:.2g})")
    worst = max(together, key=lambda case: case.worst)
    if not worst.worst <= FAR:
        raise ParityError(
            f"sequences of a batch depend on each other ({worst.where} of a {worst.name} is off by {worst.worst:.2g}), "
            "as with a scale or a norm over the whole batch: --alone runs sequences one at a time"
        )
    bitwise = not any(case.differences for case in cases)
    note = ""
    if not bitwise:
        first = max(cases, key=lambda case: case.worst)
        note = (
            f"bits depend on the batch ({sum(case.differences > 0 for case in cases)} of {len(cases)} cases differ, by "
            f"at most {first.worst:.1e}: {first.where}, {first.name}), so none are promised; --alone keeps them"
        )
    return Proven(_report(content, cases, bitwise), bitwise, note, trial.gives_probabilities())


def prove_close(step: pb.StepModel, steps: Steps, reference: Steps, bound: float) -> float:
    """Compares the steps of some sequences with those of the source; both round in their own way.

    Returns:
        The largest difference of an output or a state, relative to values above 1.

    Raises:
        ParityError: it is over the bound.
    """
    values = example(step, STEPS, LANES)
    worst = 0.0
    for lane in range(16):
        outputs, states = steps(values[:, lane])
        known, after = reference(values[:, lane])
        for found, expected in ((outputs.astype(np.float64), known.astype(np.float64)), (states, after)):
            difference = np.abs(found - expected) / np.maximum(np.abs(expected), 1)
            worst = np.inf if np.isnan(difference).any() else max(worst, float(difference.max(initial=0.0)))
    if not worst <= bound:
        raise ParityError(f"the step graph doesn't compute what the file does (off by {worst:.2g}, {bound:g} allowed)")
    return worst


def example(step: pb.StepModel, steps: int, lanes: int) -> Float32Array:
    """Draws values, [steps, lanes, input_size], with a scale for each lane; integers are 0 or 1."""
    rng = np.random.default_rng(1)
    parts = []
    for spec in step.inputs:
        tensor = step_model.tensor_of(spec)
        shape = (steps, lanes, tensor.size)
        if tensor.dtype.kind in "iu":
            parts.append(rng.integers(0, 2, shape).astype(np.float32))
        else:
            scale = rng.uniform(0.01, 2, (1, lanes, 1))
            parts.append((rng.standard_normal(shape) * scale).astype(np.float32))
    return np.concatenate(parts, axis=2)


def initial_state(step: pb.StepModel, lanes: int) -> State:
    """Returns the state of sequences before their first steps, in the runtimes' layout."""
    arrays = []
    for state in step.states:
        tensor = step_model.tensor_of(state.tensor)
        initial = initial_batch(tensor, step_model.initial_of(state, tensor), lanes if tensor.batched else 1)
        rows = int(np.prod(tensor.before))
        lanes_of = initial.reshape(rows, lanes if tensor.batched else 1, -1)
        arrays.append(np.ascontiguousarray(np.broadcast_to(lanes_of, (rows, lanes, lanes_of.shape[2]))))
    return tuple(arrays)


def flat(state: State, lane: int) -> NDArray[np.float64]:
    """Returns all values of the state of a lane, concatenated."""
    return np.concatenate([array[:, lane].astype(np.float64).reshape(-1) for array in state])


def are_probabilities(scores: Float32Array) -> bool:
    """Returns True if rows of values are between 0 and 1 and, if there are several in a row, sum to 1."""
    inside = bool(((scores >= 0) & (scores <= 1)).all())
    sums = scores.astype(np.float64).sum(axis=1)
    return inside and (scores.shape[1] == 1 or bool((np.abs(sums - 1) < 1e-4).all()))


class _Trial:
    """A step graph as served, with the expected results of its sequences.

    Args:
        runtime: Runs the graph.
        step: Its description.
        reference: Computes the steps of a sequence.
        on_case: Called with each case before it is run.
    """

    def __init__(self, runtime: StepRuntime, step: pb.StepModel, reference: Steps, on_case: OnCase) -> None:
        self._runtime, self._step, self._on_case = runtime, step, on_case
        self._names = ", ".join(repr(each.name) for each in step.outputs)
        self._values = example(step, STEPS, LANES)
        on_case("the file, sequence by sequence")
        self._known = [reference(self._values[:, lane]) for lane in range(LANES)]

    def alone(self) -> _Case:
        """Runs sequences one at a time."""
        case = self._begin("each sequence alone", 1)
        own = own_steps(self._runtime, self._step)
        for lane in range(16):
            outputs, states = own(self._values[:, lane])
            self._compare(case, lane, slice(None), outputs, states)
        return case

    def batch(self, lanes: Sequence[int], name: str) -> _Case:
        """Runs sequences side by side from their first step, cut into two ticks."""
        case = self._begin(name, len(lanes))
        cut = 1 + len(lanes) % (STEPS - 1)
        values = self._values[:, list(lanes)]
        state = initial_state(self._step, len(lanes))
        for rows in (slice(0, cut), slice(cut, STEPS)):
            result = self._runtime.run(np.ascontiguousarray(values[rows]), state)
            state = result.final_state
            for place, lane in enumerate(lanes):
                self._compare(case, lane, rows, result.logits[:, place], flat(state, place)[np.newaxis])
        return case

    def staggered(self, lanes: int) -> _Case:
        """Runs sequences at different steps, each resumed from its state."""
        case = self._begin(f"batch of {lanes}, each at another step", lanes)
        rows = [slice(lane % (STEPS - 4), lane % (STEPS - 4) + 4) for lane in range(lanes)]
        begun = []
        for lane, own in enumerate(rows):
            state = initial_state(self._step, 1)
            if own.start:
                before = np.ascontiguousarray(self._values[: own.start, lane : lane + 1])
                state = self._runtime.run(before, state).final_state
            begun.append(state)
        together = tuple(np.concatenate(arrays, axis=1) for arrays in zip(*begun, strict=True))
        values = np.stack([self._values[own, lane] for lane, own in enumerate(rows)], axis=1)
        result = self._runtime.run(values, together)
        for lane, own in enumerate(rows):
            self._compare(case, lane, own, result.logits[:, lane], flat(result.final_state, lane)[np.newaxis])
        return case

    def gives_probabilities(self) -> bool:
        """Returns True if the first output is between 0 and 1 and, with several values, sums to 1."""
        width = step_model.tensor_of(self._step.outputs[0]).size
        return are_probabilities(np.concatenate([outputs[:, :width] for outputs, _ in self._known]))

    def _begin(self, name: str, batch: int) -> _Case:
        self._on_case(name)
        return _Case(name, batch)

    def _compare(self, case: _Case, lane: int, rows: slice, outputs: Float32Array, states: NDArray[np.float64]) -> None:
        """Compares steps of a sequence, and its state after each of them or after the last."""
        expected, after = (array[rows] for array in self._known[lane])
        case.compare(np.ascontiguousarray(outputs), expected, f"output {self._names}")
        case.compare(states, after[-len(states) :], "the state")


def _report(content: bytes, cases: Sequence[_Case], bitwise: bool) -> pb.ArtifactProof:
    proof = pb.ArtifactProof(
        kind=pb.ARTIFACT_KIND_ONNX_STEP,
        file=bundle.ONNX_RNN,
        sha256=hashlib.sha256(content).hexdigest(),
        bitwise=bitwise,
        runtime="onnx",
    )
    for index, case in enumerate(cases):
        bound = FAR if index else NEAR
        proof.cases.add(
            name=case.name,
            batch=case.batch,
            time=STEPS,
            max_abs_diff=case.worst,
            bit_differences=case.differences,
            worst_ratio=case.worst / bound,
            bound=bound,
        )
    proof.max_abs_diff = max(case.worst for case in cases)
    proof.worst_ratio = max(case.worst_ratio for case in proof.cases)
    return proof
