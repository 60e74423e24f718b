"""The gate: runs every case on every artifact, against eager PyTorch and, where bits must agree, against itself.

Up to twice the longest training sequence an artifact runs freely. Beyond, each step starts from eager's own previous
state: a network whose dynamics amplify rounding would drift apart there through no fault of the export.

A network can amplify rounding before that. A row that leaves the tolerance while it runs freely is let off only if
eager comes about as far from itself when its states are moved by their rounding; then every step of the case has to
hold from eager's own previous state, and the case says of how many rows that is so.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeAlias

import numpy as np
import torch

from unroll_export.model import SimpleRNN
from unroll_export.parity.cases import PLANS, Case, Plan, draw
from unroll_export.parity.compare import differing_values, first_steps, run_cut, step_differences
from unroll_export.parity.reference import Reference
from unroll_export.parity.runners import EagerRunner, Float32Array, ParityError, Runner, open_runner
from unroll_proto import bundle
from unroll_proto.v1 import bundle_pb2 as pb

Kind: TypeAlias = "pb.ArtifactKind.ValueType"

ALLOWANCE = 16
"""How many times eager's own spread a row may be away; the spread is the largest of a few draws, no bound."""


def prove(
    model: SimpleRNN,
    artifacts: Mapping[Kind, bytes],
    longest_sequence: int,
    on_case: Callable[[Plan], None] = lambda _: None,
) -> list[pb.ArtifactProof]:
    """Runs every case on every artifact and returns the figures.

    Args:
        model: The eager network, in eval mode.
        artifacts: Content of each model artifact, by kind.
        longest_sequence: Timesteps of the longest training sequence.
        on_case: Called with each case before it is run.

    Raises:
        ParityError: an artifact can't be loaded or run, gives arrays of other shapes, is over the tolerance, or has
            bits that differ; at the first case that finds it.
    """
    eager = EagerRunner(model)
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
        for plan in PLANS:
            on_case(plan)
            case = draw(plan, model)
            results = _run_case(case, Reference(eager, case, max(2 * longest_sequence, 1)), runners)
            for kind, result in results.items():
                _check(result, kind)
                proofs[kind].cases.append(result)
                proofs[kind].max_abs_diff = max(proofs[kind].max_abs_diff, result.max_abs_diff)
    return list(proofs.values())


def _run_case(case: Case, reference: Reference, runners: Mapping[Kind, Runner]) -> dict[Kind, pb.ParityCase]:
    results = {}
    start = reference.free
    for kind, runner in runners.items():
        with _named(kind, case):
            differences, bits = _run_free(case, reference, runner)
        diff, rows = _judge(differences, reference)
        name = case.plan.name
        if rows:
            start = 0
            name += f"; rounding amplified in {rows} of {case.plan.batch} rows, proven step by step"
        bits = bits if kind in bundle.BITWISE_KINDS else 0
        results[kind] = pb.ParityCase(
            name=name, batch=case.plan.batch, time=case.plan.time, max_abs_diff=diff, bit_differences=bits
        )
    for steps in reference.forced_steps(start):
        for kind, runner in runners.items():
            with _named(kind, case):
                diff = float(step_differences(runner.run(steps.x, steps.initial_state), steps.expected).max())
            results[kind].max_abs_diff = _worse(results[kind].max_abs_diff, diff)
    return results


def _run_free(case: Case, reference: Reference, runner: Runner) -> tuple[Float32Array, int]:
    """Differences at each free step, in one call and cut; and values of all steps whose bits differ between both."""
    free, expected = reference.free, reference.expected
    one = runner.run(case.x[:, :free], case.initial_state)
    differences = step_differences(one, expected)
    if free < case.plan.time:
        one = runner.run(case.x, case.initial_state)
        start = first_steps(one, free, expected.final_state)
        differences = np.maximum(differences, step_differences(start, expected))
    if not (case.plan.time_cuts or case.plan.batch_cuts):
        return differences, 0
    cut = run_cut(runner, case)
    bits = differing_values(cut, one)
    if free < case.plan.time:
        cut, one = (first_steps(outputs, free, expected.final_state) for outputs in (cut, one))
    for other in (expected, one):
        differences = np.maximum(differences, step_differences(cut, other))
    return differences, bits


def _judge(differences: Float32Array, reference: Reference) -> tuple[float, int]:
    """Largest difference that counts, and the number of rows that were let off."""
    over = ~(differences <= bundle.TOLERANCE)
    if not over.any():
        return float(differences.max()), 0
    rows = np.flatnonzero(over.any(axis=1))
    let_off = np.zeros_like(over)
    let_off[rows] = over[rows] & (differences[rows] <= ALLOWANCE * reference.spread(rows))
    return float(np.where(let_off, 0, differences).max()), int(let_off.any(axis=1).sum())


def _check(case: pb.ParityCase, kind: Kind) -> None:
    where = f"{bundle.FILES[kind]}: case '{case.name}'"
    if not case.max_abs_diff <= bundle.TOLERANCE:
        raise ParityError(f"{where}: differs from eager PyTorch by {case.max_abs_diff:.3g}, over {bundle.TOLERANCE:g}")
    if case.bit_differences:
        raise ParityError(f"{where}: {case.bit_differences} values differ in their bits, none may")


def _worse(a: float, b: float) -> float:
    """The larger of two differences, and NaN where either is: max() can lose it."""
    return float(np.maximum(a, b))


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
def _named(kind: Kind, case: Case) -> Iterator[None]:
    """Says of a failure which artifact and which case it is."""
    try:
        yield
    except Exception as error:  # the runtimes raise classes of their own, without a common base
        problem = " ".join(str(error).split())
        raise ParityError(f"{bundle.FILES[kind]}: case '{case.plan.name}': {problem}") from error
