"""Measures a model on this machine: what its ticks cost, whether it keeps the bits, and whether it computes right."""

import math
import time

import numpy as np

from unroll_engine.kernel import NetworkWeights
from unroll_engine.kernel.exact import ExactNetwork, Near
from unroll_engine.models.spec import Float32Array, ModelSpec, State
from unroll_engine.runtimes.base import Runtime, on_host
from unroll_engine.scheduler import TickCost

_STEPS = 16
_REPEATS = 5


def tick_cost(runtime: Runtime, spec: ModelSpec, max_lanes: int) -> TickCost:
    """Fits the cost of a tick to runs of few and many lanes and steps."""
    lanes = max(2, max_lanes)
    few, many = ([measure(runtime, spec, count, steps) for steps in (1, _STEPS)] for count in (1, lanes))
    step_few, step_many = (max(1e-9, (times[1] - times[0]) / (_STEPS - 1)) for times in (few, many))
    lane = max(0.0, (step_many - step_few) / (lanes - 1))
    fixed = max(0.0, (few[0] - step_few + many[0] - step_many) / 2)
    return TickCost(fixed, max(1e-9, step_few - lane), lane)


def measure(runtime: Runtime, spec: ModelSpec, lanes: int, steps: int) -> float:
    """Returns the shortest of a few runs, in seconds: other load of the machine only adds to it."""
    x, state = _example(spec, lanes, steps)
    times = []
    for _ in range(_REPEATS):
        begin = time.perf_counter()
        runtime.run(x, state)
        times.append(time.perf_counter() - begin)
    return min(times)


def keeps_bits(runtime: Runtime, spec: ModelSpec, max_lanes: int) -> bool:
    """Returns True if this machine gives a lane the same bits at several numbers of lanes."""
    x, state = _example(spec, max_lanes, 4)
    whole = on_host(runtime.run(x, state))
    for lanes in {count for count in (1, 2, 3, max_lanes // 2, max_lanes - 1) if 0 < count <= max_lanes}:
        few = tuple(np.ascontiguousarray(array[:, :lanes]) for array in state)
        part = on_host(runtime.run(np.ascontiguousarray(x[:, :lanes]), few))
        pairs = [(part.states, whole.states), (part.logits, whole.logits)]
        pairs += zip(part.final_state, whole.final_state, strict=True)
        if any(one.tobytes() != all_[:, :lanes].tobytes() for one, all_ in pairs):
            return False
    return True


def problem_of(runtime: Runtime, spec: ModelSpec) -> str:
    """Returns the problem with the model's results for ordinary inputs; empty if there is none.

    The proof is the claim of the bundle's maker. Weights can make every result NaN, and TorchScript can return arrays
    of any shape, which would fail ticks that other sequences share.
    """
    steps, lanes = 2, 3
    dtypes = {f"final_{tensor.name}": tensor.dtype for tensor in spec.states}
    result = on_host(runtime.run(*_example(spec, lanes, steps)))
    for name, array, shape in (
        ("logits", result.logits, (steps, lanes, spec.output_size)),
        ("states", result.states, (steps, lanes, spec.hidden_size)),
        *(
            (f"final_{tensor.name}", array, (tensor.shape[0], lanes, tensor.shape[1]))
            for array, tensor in zip(result.final_state, spec.states, strict=True)
        ),
    ):
        if array.shape != shape or array.dtype != dtypes.get(name, np.float32):
            return f"{name}: {array.dtype} {list(array.shape)}, {dtypes.get(name, 'float32')} {list(shape)} expected"
        if not np.isfinite(array).all():
            return f"{name}: has values that are not finite"
    return ""


def difference_of(runtime: Runtime, reference: Runtime, weights: NetworkWeights, spec: ModelSpec) -> str:
    """Returns where two runtimes differ by more than float32 allows; empty if they agree.

    That is twice the bound of the proof, since either may be so far from float64. One step is compared, from random
    states: over many steps two right runtimes can part, if the network expands.
    """
    x, state = _example(spec, 64, 1)
    got, expected = on_host(runtime.run(x, state)), on_host(reference.run(x, state))
    exact = ExactNetwork.of(weights)
    final = exact.step(exact.inputs(x[0]), state)
    last = Near(final[0].value[-1], final[0].off[-1])
    named = [("logits", got.logits[0], expected.logits[0], exact.logits(last))]
    named += [("states", got.states[0], expected.states[0], last)]
    named += [("final states", *each) for each in zip(got.final_state, expected.final_state, final, strict=True)]
    for name, one, two, near in named:
        excess = np.abs(one - two) - 2 * near.off
        if not (excess <= 0).all():
            worst = np.unravel_index(excess.argmax(), excess.shape)
            difference, allowed = abs(float(one[worst]) - float(two[worst])), 2 * float(near.off[worst])
            return f"its {name} differ from those of model.onnx by {difference:.1e}, {allowed:.1e} allowed"
    return ""


def _example(spec: ModelSpec, lanes: int, steps: int) -> tuple[Float32Array, State]:
    rng = np.random.default_rng(lanes)
    x = rng.standard_normal((steps, lanes, spec.input_size), dtype=np.float32)
    initial = spec.initial_state(lanes)
    if spec.step:
        # Not any value is good for a graph from elsewhere: a whole number can be an index.
        widths = [(tensor.dtype.kind in "iu", math.prod(tensor.shape)) for tensor in spec.step.inputs]
        whole = np.concatenate([np.full(width, is_whole) for is_whole, width in widths])
        x[..., whole] = x[..., whole] > 0
        return x, initial
    return x, tuple(rng.uniform(-1, 1, zeros.shape).astype(np.float32) for zeros in initial)
