"""The gate: compares every artifact, in each runtime that serves it, with float64, and its bits with themselves.

Single steps are judged value by value, from the same float32 state, by the bound that float32 arithmetic allows
(`unroll_engine.kernel.exact`). Probes with one feature or one unit at a time have sums of few terms, whose bounds are
a few roundings wide, so that one wrong weight shows in a network of any size. Free runs are judged by the distance
from float64 of eager PyTorch, and of float64 with rounding (`free_runs`).
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import groupby
from operator import attrgetter
from typing import Any, NamedTuple

import numpy as np
import torch

from unroll_engine.errors import RuntimeUnavailableError
from unroll_engine.kernel.exact import ExactNetwork, Float64Array, Near
from unroll_engine.runtimes.base import Runtime
from unroll_export.model import RecurrentClassifier
from unroll_export.parity.cases import PLANS, Drawn, Plan, draw
from unroll_export.parity.compare import check_alike, differing_values, run_cut
from unroll_export.parity.free_runs import FreeRun
from unroll_export.parity.judging import Judged, judge, worst
from unroll_export.parity.probes import PROBES, Probe, WeightFinder, probes
from unroll_export.parity.runners import (
    RUNTIMES,
    EagerRunner,
    Kind,
    Outputs,
    ParityError,
    Runner,
    RuntimeRunner,
    exact_network,
    exact_step,
)
from unroll_proto import bundle
from unroll_proto.v1 import bundle_pb2 as pb

CASES = len(PROBES) + len(PLANS)
"""Cases of a proof."""
STEEP = 0.05
"""Least slope of tanh at which weights are recovered from states."""


class Proven(NamedTuple):
    """Results of the proof of a model's artifacts."""

    proofs: list[pb.ArtifactProof]
    """Proofs, one for each artifact and runtime that serves it."""
    left_out: dict[str, str]
    """Runtimes that were not judged, each with the reason."""


class _Candidate(NamedTuple):
    """An artifact in a runtime, and its proof so far."""

    proof: pb.ArtifactProof
    runner: Runner

    @property
    def name(self) -> str:
        return f"{self.proof.file} ({self.proof.runtime})"


def prove(
    model: RecurrentClassifier[Any],
    artifacts: Mapping[Kind, bytes],
    on_case: Callable[[str], None] = lambda _: None,
    runtimes: Mapping[Kind, Mapping[str, Callable[[bytes], Runtime]]] = RUNTIMES,
) -> Proven:
    """Runs every case on every artifact and returns the results.

    Args:
        model: The eager network, in eval mode.
        artifacts: Content of each model artifact, by kind.
        on_case: Called with the name of each case before it is run.
        runtimes: Runtimes that serve each artifact.

    Raises:
        ParityError: an artifact can't be loaded or run, returns arrays of other shapes, exceeds the bound, or has
            differing bits; raised at the first such case.
    """
    eager, exact = EagerRunner(model), exact_network(model)
    with _one_thread():
        candidates, left_out = _open(artifacts, runtimes, model.rnn.num_layers)
        for name, parts in probes(model):
            on_case(name)
            for candidate, case in zip(candidates, _run_probes(name, parts, eager, exact, candidates), strict=True):
                _add(candidate, case)
        for values, plans in groupby(PLANS, attrgetter("values")):
            drawn = draw(values, model)
            run = FreeRun(drawn, eager, exact)
            whole: dict[str, Outputs] = {}
            for plan in plans:
                on_case(plan.name)
                for candidate in candidates:
                    _add(candidate, _run_case(plan, drawn, run, candidate, whole))
    return Proven([candidate.proof for candidate in candidates], left_out)


def _open(
    artifacts: Mapping[Kind, bytes], runtimes: Mapping[Kind, Mapping[str, Callable[[bytes], Runtime]]], layers: int
) -> tuple[list[_Candidate], dict[str, str]]:
    """Loads each artifact into the runtimes that serve it."""
    candidates: list[_Candidate] = []
    left_out = {}
    for kind, content in artifacts.items():
        file, digest = bundle.FILES[kind], hashlib.sha256(content).hexdigest()
        for name, runtime in runtimes[kind].items():
            try:
                opened = runtime(content)
            except RuntimeUnavailableError as error:
                left_out[name] = str(error)
                continue
            except Exception as error:  # the runtimes raise their own classes, without a common base
                raise ParityError(f"{file}: can't be loaded: {_one_line(error)}") from error
            proof = pb.ArtifactProof(kind=kind, file=file, sha256=digest, bitwise=opened.bitwise, runtime=name)
            candidates.append(_Candidate(proof, RuntimeRunner(opened, layers)))
    return candidates, left_out


def _add(candidate: _Candidate, case: pb.ParityCase) -> None:
    where, proof = f"{candidate.name}: case '{case.name}'", candidate.proof
    if not case.worst_ratio <= 1:
        times = f"{case.worst_ratio:.3g} times what float32 allows ({case.bound:.2g})"
        raise ParityError(f"{where}: is off from float64 by {times}")
    if case.bit_differences:
        raise ParityError(f"{where}: {case.bit_differences} values differ in their bits, none may")
    proof.cases.append(case)
    proof.max_abs_diff = max(proof.max_abs_diff, case.max_abs_diff)
    proof.worst_ratio = max(proof.worst_ratio, case.worst_ratio)


def _run_probes(
    name: str, parts: Iterator[Probe], eager: Runner, exact: ExactNetwork, candidates: list[_Candidate]
) -> list[pb.ParityCase]:
    """Judges single steps, and the readout separately."""
    cases = [pb.ParityCase(name=name, time=1) for _ in candidates]
    for part in parts:
        expected = eager.run(part.x[:, None], part.state)
        state = exact_step(exact, exact.inputs(part.x), part.state)
        weights = _Weights(part, state, exact, expected) if part.identifies else None
        for candidate, case in zip(candidates, cases, strict=True):
            with _named(candidate, name):
                got = candidate.runner.run(part.x[:, None], part.state)
                check_alike(got, expected)
            case.batch = max(case.batch, len(part.x))
            case.max_abs_diff = float(np.maximum(case.max_abs_diff, _distance(got, expected)))
            judged = [Judged(case.worst_ratio, case.bound), *_judge_step(got, state, exact)]
            judged += weights.judge(got) if weights else []
            case.worst_ratio, case.bound = worst(judged)
    return cases


def _judge_step(got: Outputs, state: Near, exact: ExactNetwork) -> Iterator[Judged]:
    """Judges all states, the logits, and the readout separately, from the states that the artifact computed."""
    states, logits = got.states[:, 0], got.logits[:, 0]
    top = len(exact.layers) - 1
    last = Near(state.value[top], state.off[top])
    yield judge(got.final_state, state)
    yield judge(states, last)
    yield judge(logits, exact.logits(last))
    yield judge(logits, exact.logits(states))


class _Weights:
    """Recovers weights from the answers to a probe: the readout's and, under tanh, all but those of the features.

    Only under tanh a state determines the argument of its activation.
    """

    def __init__(self, part: Probe, state: Near, exact: ExactNetwork, honest: Outputs) -> None:
        self._exact, self._right = exact, state.value
        layers = exact.layers if exact.cell == "rnn_tanh" else ()
        slope = 1 - state.value[: len(layers)] ** 2
        # Outside the steep part of tanh, its value does not determine its argument.
        self._inverse_slope = np.where(slope > STEEP, 1 / np.maximum(slope, STEEP), 0)
        top = state.value[len(exact.layers) - 1]
        inputs, weights = [top], [exact.readout.weight]
        sizes = [exact.readout.sums(top).sizes.astype(np.float64)]
        for layer, (of_input, of_state) in enumerate(layers):
            # The features of the first layer are all 0, or too many.
            below = [state.value[layer - 1]] if layer else []
            sums = of_state.sums(part.state[layer])
            sums += of_input.sums(below[0]) if layer else exact.inputs(part.x)
            inputs.append(np.hstack([part.state[layer], *below]).astype(np.float64))
            weights.append(np.hstack([of_state.weight, *([of_input.weight] if layer else [])]))
            # The rounding of the value is larger in the argument.
            sizes.append(np.maximum((slope[layer] > STEEP) * sums.sizes, self._inverse_slope[layer]))
        self._finders = [
            WeightFinder(taken, weight, size, residuals)
            for taken, weight, size, residuals in zip(inputs, weights, sizes, self._residuals(honest), strict=True)
        ]

    def judge(self, got: Outputs) -> Iterator[Judged]:
        """Judges the weights of the readout, and of the states of every layer."""
        for finder, residuals in zip(self._finders, self._residuals(got), strict=True):
            yield finder.judge(residuals)

    def _residuals(self, got: Outputs) -> Iterator[Float64Array]:
        """Returns the distances of the sums from float64's."""
        yield got.logits[:, 0] - self._exact.logits(got.states[:, 0]).value
        found = len(self._inverse_slope)
        yield from (got.final_state[:found] - self._right[:found]) * self._inverse_slope


def _run_case(
    plan: Plan, drawn: Drawn, run: FreeRun, candidate: _Candidate, whole: dict[str, Outputs]
) -> pb.ParityCase:
    """Judges a free run, in one call and cut; `whole` keeps the results of one call, by the candidate's name."""
    with _named(candidate, plan.name):
        if candidate.name not in whole:
            whole[candidate.name] = candidate.runner.run(*drawn)
        ways = [whole[candidate.name]]
        if plan.time_cuts or plan.batch_cuts:
            ways.append(run_cut(candidate.runner, plan, drawn))
        for way in ways:
            check_alike(way, run.expected)
    judged = worst(run.judge(way) for way in ways)
    return pb.ParityCase(
        name=plan.name,
        batch=plan.values.batch,
        time=plan.values.time,
        max_abs_diff=float(np.max([_distance(way, run.expected) for way in ways])),
        bit_differences=differing_values(ways[-1], ways[0]) if candidate.proof.bitwise else 0,
        worst_ratio=judged.ratio,
        bound=judged.bound,
    )


def _distance(got: Outputs, expected: Outputs) -> float:
    """Returns the largest absolute difference from eager PyTorch; NaN if a value is not a number."""
    return float(np.max([np.abs(a - b).max() for a, b in zip(got, expected, strict=True)]))


@contextmanager
def _one_thread() -> Iterator[None]:
    """Limits torch to one thread: at these sizes several threads wait longer than they compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _named(candidate: _Candidate, case: str) -> Iterator[None]:
    """Makes an error that names the artifact and the case."""
    try:
        yield
    except Exception as error:  # the runtimes raise their own classes, without a common base
        raise ParityError(f"{candidate.name}: case '{case}': {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
