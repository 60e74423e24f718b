"""Measures a model on this machine: what its ticks cost, whether it keeps the bits, and whether it computes right."""

import time

import numpy as np

from unroll_engine.models.spec import Float32Array, ModelSpec, State
from unroll_engine.runtimes.base import Runtime
from unroll_engine.scheduler import TickCost

_STEPS = 16
_REPEATS = 5
TOLERANCE = 1e-3
"""Largest difference allowed between two runtimes of one network in a step, of values up to 1 or by the largest.

Rounding of wide layers stays far below it, and other weights or gates differ by far more.
"""


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
    """Why a runtime does not compute what another does; empty if every value is within TOLERANCE.

    One step is compared, from random states: over many steps two right runtimes can part, if the network expands.
    """
    x, state = _example(spec, 64, 1)
    got, expected = runtime.run(x, state), reference.run(x, state)
    named = [("logits", got.logits, expected.logits), ("states", got.states, expected.states)]
    named += [("final states", *pair) for pair in zip(got.final_state, expected.final_state, strict=True)]
    for name, one, two in named:
        difference = float(np.abs(one - two).max())
        allowed = TOLERANCE * max(1.0, float(np.abs(two).max()))
        if not difference <= allowed:
            return f"its {name} differ from those of model.onnx by {difference:.1e}, {allowed:.0e} allowed"
    return ""


def _example(spec: ModelSpec, lanes: int, steps: int) -> tuple[Float32Array, State]:
    rng = np.random.default_rng(lanes)
    x = rng.standard_normal((steps, lanes, spec.input_size), dtype=np.float32)
    return x, tuple(rng.uniform(-1, 1, zeros.shape).astype(np.float32) for zeros in spec.zero_state(lanes))
