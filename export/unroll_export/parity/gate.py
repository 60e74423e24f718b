"""The gate: holds every artifact against float64, and against itself where bits must agree.

Single steps are judged value by value, from the same float32 state, by the bound that float32 arithmetic allows
(`exact.py`). Probes with one feature or one unit at a time make sums of few terms, whose bounds are a few roundings
wide, so that one wrong weight shows whatever the size of the network. Free runs are judged by the distance from float64
that eager PyTorch has itself: a network can amplify rounding, in every implementation alike.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple, TypeAlias

import numpy as np
import torch

from unroll_export.model import SimpleRNN
from unroll_export.parity.cases import PLANS, Case, draw
from unroll_export.parity.compare import check_alike, differing_values, run_cut
from unroll_export.parity.exact import UNIT, ExactNetwork, Float64Array, Step
from unroll_export.parity.probes import PROBES, Probe, probes, weight_errors
from unroll_export.parity.runners import EagerRunner, Float32Array, Outputs, ParityError, Runner, open_runner
from unroll_proto import bundle
from unroll_proto.v1 import bundle_pb2 as pb

Kind: TypeAlias = "pb.ArtifactKind.ValueType"

CASES = len(PROBES) + len(PLANS)
"""Cases of a proof."""
FREE = 128
"""A free run may be so many times as far from float64 as eager PyTorch is."""
STEEP = 0.05
"""Least slope of tanh where weights are found again from states."""
LOST = 0.01
"""Allowance from which on a free run is not judged: dynamics that amplify so much are a matter of chance."""
NUDGED = 7
"""Further runs of eager PyTorch, from states a rounding away: one run alone can be near by chance."""


class Judged(NamedTuple):
    """The value of some outputs that is nearest to its bound, or farthest over it."""

    ratio: float
    """Distance from float64 / bound; NaN if a value is not a number."""
    bound: float


def prove(
    model: SimpleRNN,
    artifacts: Mapping[Kind, bytes],
    on_case: Callable[[str], None] = lambda _: None,
) -> list[pb.ArtifactProof]:
    """Runs every case on every artifact and returns the figures.

    Args:
        model: The eager network, in eval mode.
        artifacts: Content of each model artifact, by kind.
        on_case: Called with the name of each case before it is run.

    Raises:
        ParityError: an artifact can't be loaded or run, gives arrays of other shapes, is over the bound, or has bits
            that differ; at the first case that finds it.
    """
    eager, exact = EagerRunner(model), ExactNetwork(model)
    runners = {kind: open_runner(kind, content) for kind, content in artifacts.items()}
    proofs = {
        kind: pb.ArtifactProof(
            kind=kind,
            file=bundle.FILES[kind],
            sha256=hashlib.sha256(content).hexdigest(),
            bitwise=kind in bundle.BITWISE_KINDS,
        )
        for kind, content in artifacts.items()
    }
    with _one_thread():
        for name, parts in probes(model):
            on_case(name)
            for kind, result in _run_probes(name, parts, eager, exact, runners).items():
                _add(proofs[kind], result)
        for plan in PLANS:
            on_case(plan.name)
            case = draw(plan, model)
            for kind, result in _run_case(case, eager, exact, runners).items():
                _add(proofs[kind], result)
    return list(proofs.values())


def _add(proof: pb.ArtifactProof, case: pb.ParityCase) -> None:
    where = f"{proof.file}: case '{case.name}'"
    if not case.worst_ratio <= 1:
        times = f"{case.worst_ratio:.3g} times what float32 allows ({case.bound:.2g})"
        raise ParityError(f"{where}: is off from float64 by {times}")
    if case.bit_differences:
        raise ParityError(f"{where}: {case.bit_differences} values differ in their bits, none may")
    proof.cases.append(case)
    proof.max_abs_diff = max(proof.max_abs_diff, case.max_abs_diff)
    proof.worst_ratio = max(proof.worst_ratio, case.worst_ratio)


def _run_probes(
    name: str, parts: Iterator[Probe], eager: Runner, exact: ExactNetwork, runners: Mapping[Kind, Runner]
) -> dict[Kind, pb.ParityCase]:
    """Judges single steps, and the readout by itself."""
    results = {kind: pb.ParityCase(name=name, batch=0, time=1) for kind in runners}
    for part in parts:
        expected = eager.run(part.x[:, None], part.state)
        step = exact.step(part.x, part.state)
        for kind, runner in runners.items():
            with _named(kind, name):
                got = runner.run(part.x[:, None], part.state)
                check_alike(got, expected)
            result, states = results[kind], got.states[:, 0]
            result.batch = max(result.batch, len(part.x))
            result.max_abs_diff = float(np.maximum(result.max_abs_diff, _distance(got, expected)))
            for judged in (
                _judge(got.final_state, step.states, step.state_bounds),
                _judge(states, step.states[-1], step.state_bounds[-1]),
                _judge(got.logits[:, 0], step.logits, step.logit_bounds),
                # From the very states that the artifact computed.
                _judge(got.logits[:, 0], exact.readout(states), exact.readout_bounds(states)),
                *(_identify(part, got, step, exact) if part.identifies else ()),
            ):
                _note(result, judged)
    return results


def _identify(part: Probe, got: Outputs, step: Step, exact: ExactNetwork) -> Iterator[Judged]:
    """Judges the weights of the readout, and of all states."""
    states = got.states[:, 0]
    yield Judged(*weight_errors(states, got.logits[:, 0] - exact.readout(states), exact.readout_weights))
    for layer, right in enumerate(step.states):
        # Off the tanh's steep part its argument can't be told from its value.
        slope = 1 - right**2
        residuals = np.where(slope > STEEP, (got.final_state[layer] - right) / np.maximum(slope, STEEP), 0)
        inputs = np.hstack([part.state[layer], *step.states[max(layer - 1, 0) : layer]])
        yield Judged(*weight_errors(inputs, residuals, exact.inner_weights(layer)))


def _run_case(
    case: Case, eager: Runner, exact: ExactNetwork, runners: Mapping[Kind, Runner]
) -> dict[Kind, pb.ParityCase]:
    """Judges free runs, in one call and cut."""
    plan = case.plan
    expected = eager.run(case.x, case.initial_state)
    right, bounds = _run_free(case, expected, eager, exact)
    results = {}
    for kind, runner in runners.items():
        with _named(kind, plan.name):
            ways = [runner.run(case.x, case.initial_state)]
            if plan.time_cuts or plan.batch_cuts:
                ways.append(run_cut(runner, case))
            for way in ways:
                check_alike(way, expected)
        bits = differing_values(ways[-1], ways[0]) if kind in bundle.BITWISE_KINDS else 0
        diff = float(np.max([_distance(way, expected) for way in ways]))
        result = pb.ParityCase(
            name=plan.name, batch=plan.batch, time=plan.time, max_abs_diff=diff, bit_differences=bits
        )
        for way in ways:
            for values, among, bound in zip(_in_float64(way), right, bounds, strict=True):
                _note(result, _judge(values, among, bound))
        results[kind] = result
    return results


def _run_free(
    case: Case, expected: Outputs, eager: Runner, exact: ExactNetwork
) -> tuple[tuple[Float64Array, ...], tuple[Float64Array, ...]]:
    """The outputs in float64, and the bound of each: logits and states [batch, time, ...], final state."""
    state = case.initial_state.astype(np.float64)
    steps = []
    for time in range(case.plan.time):
        steps.append(exact.step(case.x[:, time], state))
        state = steps[-1].states
    right = (
        np.stack([step.logits for step in steps], axis=1),
        np.stack([step.states[-1] for step in steps], axis=1),
        steps[-1].states,
    )
    rng = np.random.default_rng(0)
    runs = [expected]
    for _ in range(NUDGED):
        moves = rng.uniform(-2 * UNIT, 2 * UNIT, case.initial_state.shape).astype(np.float32)
        runs.append(eager.run(case.x, case.initial_state + moves))
    off = [np.zeros((case.plan.time, 1)) for _ in range(2)]
    for run in runs:
        for index, values in enumerate((run.logits, run.states)):
            # Over all rows and units, up to each step: where one is far off, others only chance not to be.
            distance = np.abs(values - right[index]).max(axis=(0, 2))
            off[index] = np.maximum(off[index], np.maximum.accumulate(distance)[:, None])
    least = [
        np.stack([step.logit_bounds for step in steps], axis=1),
        np.stack([step.state_bounds[-1] for step in steps], axis=1),
        steps[-1].state_bounds,
    ]
    finals = max(float(np.abs(run.final_state - right[2]).max()) for run in runs)
    bounds = (
        least[0] + _allowed(off[0]),
        least[1] + _allowed(off[1]),
        least[2] + _allowed(max(finals, float(off[1][-1, 0]))),
    )
    return right, bounds


def _allowed(distance: Float64Array | float) -> Float64Array:
    """What eager PyTorch's own distance from float64 allows; infinite where that tells no more."""
    allowed = FREE * np.asarray(distance)
    return np.where(allowed > LOST, np.inf, allowed)


def _in_float64(outputs: Outputs) -> Iterator[Float64Array]:
    return (values.astype(np.float64) for values in outputs)


def _judge(got: Float32Array | Float64Array, right: Float64Array, bounds: Float64Array) -> Judged:
    ratios = np.abs(got - right) / bounds
    if not np.isfinite(ratios).all():
        return Judged(float("nan"), 0.0)
    worst = int(ratios.argmax())
    return Judged(float(ratios.flat[worst]), float(np.broadcast_to(bounds, ratios.shape).flat[worst]))


def _note(case: pb.ParityCase, judged: Judged) -> None:
    # NaN is not at most anything; once it is there, it stays.
    if not (np.isnan(case.worst_ratio) or judged.ratio <= case.worst_ratio):
        case.worst_ratio, case.bound = judged


def _distance(got: Outputs, expected: Outputs) -> float:
    """Largest absolute difference from eager PyTorch; NaN if a value is not a number."""
    return float(np.max([np.abs(a - b).max() for a, b in zip(got, expected, strict=True)]))


@contextmanager
def _one_thread() -> Iterator[None]:
    """Keeps torch to one thread: at these sizes more of them wait for each other longer than they compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _named(kind: Kind, name: str) -> Iterator[None]:
    """Names the artifact and the case of a failure."""
    try:
        yield
    except Exception as error:  # the runtimes raise classes of their own, without a common base
        problem = " ".join(str(error).split())
        raise ParityError(f"{bundle.FILES[kind]}: case '{name}': {problem}") from error
