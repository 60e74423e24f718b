"""Measures the graph forms of a model on this machine: how fast each is, and which give the same bits."""

import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from unroll_engine.models.spec import Float32Array, ModelSpec, State
from unroll_engine.runtimes.base import Runtime, TickResult
from unroll_engine.scheduler import TickCost

_STEPS = 16
_REPEATS = 5
TOLERANCE = 1e-5
"""Largest difference allowed between two runtimes of one network in a step; as in the proof."""


class FormTiming(NamedTuple):
    """Speed of a form at a number of lanes.

    Attributes:
        artifact: File of the bundle.
        lanes: Sequences in a run.
        seconds_per_step: Seconds for a timestep of all lanes, in runs of 16.
        same_bits: Whether it gives the bits of the first form.
        chosen: Whether it runs ticks of this many lanes, and of more, up to the next entry.
    """

    artifact: str
    lanes: int
    seconds_per_step: float
    same_bits: bool
    chosen: bool


class ChosenForms:
    """Runs each tick on the form that was measured to be the fastest for its lanes (see Runtime).

    Args:
        forms: For ticks of at least so many lanes, by that number; 1 is one of them.
    """

    def __init__(self, forms: Mapping[int, Runtime]) -> None:
        first = forms[1]
        self.name = first.name
        self.device = first.device
        self.artifact = first.artifact
        self.bitwise = first.bitwise
        self._forms = sorted(forms.items(), reverse=True)

    def run(self, x: Float32Array, state: State) -> TickResult:
        """See Runtime.run."""
        lanes = x.shape[1]
        return next(form for least, form in self._forms if lanes >= least).run(x, state)


def choose(
    forms: Sequence[Runtime], spec: ModelSpec, max_lanes: int, known: Sequence[FormTiming] = ()
) -> tuple[Runtime, tuple[FormTiming, ...]]:
    """Times equivalent forms, and chooses for each number of lanes the fastest that keeps the bits.

    Args:
        forms: The first claims the same bits in any batch. Another is chosen only if it is faster and gives exactly the
            bits of the first.
        spec: The model.
        max_lanes: The widest tick.
        known: Measurements of a model of the same sizes, to reuse: the graphs differ in the values of weights only.

    Returns:
        The runtime, and the measurements.
    """
    if len(forms) == 1:
        return forms[0], ()
    measured = {(timing.artifact, timing.lanes): timing.seconds_per_step for timing in known}
    counts = sorted({1, min(8, max_lanes), max_lanes})
    timings: list[FormTiming] = []
    chosen: dict[int, Runtime] = {}
    same = {form: form is forms[0] or _same_bits(forms[0], form, spec, max_lanes) for form in forms}
    for lanes in counts:
        seconds = {
            form: measured.get((form.artifact, lanes)) or measure(form, spec, lanes, _STEPS) / _STEPS for form in forms
        }
        fastest = min((form for form in forms if same[form]), key=seconds.__getitem__)
        chosen[lanes] = fastest
        timings += [FormTiming(form.artifact, lanes, seconds[form], same[form], form is fastest) for form in forms]
    if all(form is forms[0] for form in chosen.values()):
        return forms[0], tuple(timings)
    return ChosenForms(chosen), tuple(timings)


def tick_cost(runtime: Runtime, spec: ModelSpec, max_lanes: int) -> TickCost:
    """Fits the cost of a tick to runs of few and many lanes and steps."""
    lanes = max(2, max_lanes)
    few, many = ([measure(runtime, spec, count, steps) for steps in (1, _STEPS)] for count in (1, lanes))
    step_few, step_many = (max(1e-9, (times[1] - times[0]) / (_STEPS - 1)) for times in (few, many))
    lane = max(0.0, (step_many - step_few) / (lanes - 1))
    fixed = max(0.0, (few[0] - step_few + many[0] - step_many) / 2)
    return TickCost(fixed, max(1e-9, step_few - lane), lane)


def measure(runtime: Runtime, spec: ModelSpec, lanes: int, steps: int) -> float:
    """The shortest of a few runs, in seconds: other load of the machine only adds to it."""
    x, state = _example(spec, lanes, steps)
    times = []
    for _ in range(_REPEATS):
        begin = time.perf_counter()
        runtime.run(x, state)
        times.append(time.perf_counter() - begin)
    return min(times)


def keeps_bits(runtime: Runtime, spec: ModelSpec, max_lanes: int) -> bool:
    """Whether this machine gives a lane the same bits at several numbers of lanes."""
    x, state = _example(spec, max_lanes, 4)
    whole = runtime.run(x, state)
    for lanes in {count for count in (1, 2, 3, max_lanes // 2, max_lanes - 1) if 0 < count <= max_lanes}:
        part = runtime.run(
            np.ascontiguousarray(x[:, :lanes]), tuple(np.ascontiguousarray(array[:, :lanes]) for array in state)
        )
        if (part.states.tobytes(), part.logits.tobytes()) != (
            whole.states[:, :lanes].tobytes(),
            whole.logits[:, :lanes].tobytes(),
        ):
            return False
    return True


def problem_of(runtime: Runtime, spec: ModelSpec) -> str:
    """The problem with the model's results for ordinary inputs; empty if there is none.

    The proof is the claim of the bundle's maker. Weights can make every result NaN, and TorchScript can return arrays
    of any shape, which would fail ticks that other sequences share.
    """
    steps, lanes = 2, 3
    result = runtime.run(*_example(spec, lanes, steps))
    for name, array, shape in (
        ("logits", result.logits, (steps, lanes, spec.output_size)),
        ("states", result.states, (steps, lanes, spec.hidden_size)),
        *(
            ("final_state", array, (layers, lanes, size))
            for array, (layers, size) in zip(result.final_state, spec.state_shapes, strict=True)
        ),
    ):
        if array.shape != shape or array.dtype != np.float32:
            return f"{name}: {array.dtype} {list(array.shape)}, float32 {list(shape)} expected"
        if not np.isfinite(array).all():
            return f"{name}: has values that are not finite"
    return ""


def difference_of(runtime: Runtime, reference: Runtime, spec: ModelSpec) -> str:
    """Why a runtime does not compute what another does; empty if every step is within TOLERANCE.

    One step is compared, from random states: over many steps two right runtimes can part, if the network expands.
    """
    x, state = _example(spec, 64, 1)
    results = [runtime.run(x, state), reference.run(x, state)]
    for name in ("logits", "states"):
        one, two = (getattr(result, name) for result in results)
        difference = float(np.abs(one - two).max())
        if not difference <= TOLERANCE:
            return f"its {name} differ from {reference.name}'s by {difference:.1e}, {TOLERANCE:.0e} allowed"
    return ""


def _same_bits(first: Runtime, other: Runtime, spec: ModelSpec, max_lanes: int) -> bool:
    for lanes in sorted({1, 2, 3, max_lanes}):
        for steps in (1, _STEPS):
            x, state = _example(spec, lanes, steps)
            expected, got = first.run(x, state), other.run(x, state)
            if any(
                one.tobytes() != two.tobytes()
                for one, two in zip((*expected[:2], *expected[2]), (*got[:2], *got[2]), strict=True)
            ):
                return False
    return True


def _example(spec: ModelSpec, lanes: int, steps: int) -> tuple[Float32Array, State]:
    rng = np.random.default_rng(lanes)
    x = rng.standard_normal((steps, lanes, spec.input_size), dtype=np.float32)
    return x, tuple(rng.uniform(-1, 1, zeros.shape).astype(np.float32) for zeros in spec.zero_state(lanes))
