"""The choice of a graph form: the faster one, and only where it keeps the bits."""

import time

import numpy as np
import pytest
from support.models import random_network

from unroll_engine.models.calibration import ChosenForms, choose, keeps_bits, tick_cost
from unroll_engine.models.spec import Float32Array, ModelKey, ModelSpec, State
from unroll_engine.runtimes.base import Runtime, TickResult
from unroll_engine.runtimes.onnx import OnnxCpuRuntime, OnnxOperatorRuntime
from unroll_export.graphs.onnx_rnn import build_onnx_rnn
from unroll_export.graphs.onnx_scan import build_onnx_scan

NETWORK = random_network(features=3, hidden=8, outputs=4)
SPEC = ModelSpec(ModelKey("m", 1), "simple_rnn", 3, 8, 4, 1, ("a",) * 4, ("x",) * 3)
SCAN = OnnxCpuRuntime(build_onnx_scan(NETWORK))


class Slowed:
    """The real runtime, slower by a busy wait where it has many lanes or few."""

    name, device, bitwise = "onnx", "cpu", True

    def __init__(self, artifact: str, few: float, many: float) -> None:
        self.artifact = artifact
        self.ran: list[int] = []
        self._few, self._many = few, many

    def run(self, x: Float32Array, state: State) -> TickResult:
        self.ran.append(x.shape[1])
        end = time.perf_counter() + (self._few if x.shape[1] < 8 else self._many)
        while time.perf_counter() < end:
            pass
        return SCAN.run(x, state)


class Shifted(Slowed):
    """A form as fast as can be, with other bits."""

    def run(self, x: Float32Array, state: State) -> TickResult:
        logits, states, final = SCAN.run(x, state)
        return TickResult(logits, np.nextafter(states, np.float32(2)), final)


def run_of(lanes: int) -> tuple[Float32Array, State]:
    return np.zeros((2, lanes, 3), np.float32), SPEC.zero_state(lanes)


def test_each_number_of_lanes_is_run_with_the_form_that_is_faster_there() -> None:
    first, other = Slowed("first", 0.0, 0.02), Slowed("other", 0.02, 0.0)
    runtime, timings = choose([first, other], SPEC, max_lanes=64)
    chosen = {(timing.lanes, timing.artifact) for timing in timings if timing.chosen}
    assert chosen == {(1, "first"), (8, "other"), (64, "other")}
    assert all(timing.same_bits and timing.seconds_per_step > 0 for timing in timings)
    assert isinstance(runtime, ChosenForms)
    for lanes, expected in ((1, first), (7, first), (8, other), (80, other)):
        before = len(expected.ran)
        runtime.run(*run_of(lanes))
        assert expected.ran[before:] == [lanes]


def test_a_faster_form_with_other_bits_is_not_chosen() -> None:
    first, other = Slowed("first", 0.01, 0.01), Shifted("other", 0, 0)
    runtime, timings = choose([first, other], SPEC, max_lanes=16)
    assert runtime is first
    assert {timing.artifact: timing.same_bits for timing in timings} == {"first": True, "other": False}
    assert {timing.artifact for timing in timings if timing.chosen} == {"first"}


def test_the_real_forms_are_compared_and_what_is_chosen_keeps_the_bits() -> None:
    operator = OnnxOperatorRuntime(build_onnx_rnn(NETWORK))
    runtime, timings = choose([SCAN, operator], SPEC, max_lanes=64)
    assert [timing.lanes for timing in timings] == [1, 1, 8, 8, 64, 64]
    assert keeps_bits(runtime, SPEC, 80)
    for lanes in (1, 2, 33, 80):
        x = np.random.default_rng(lanes).normal(size=(9, lanes, 3)).astype(np.float32)
        expected, got = SCAN.run(x, SPEC.zero_state(lanes)), runtime.run(x, SPEC.zero_state(lanes))
        assert got.logits.tobytes() == expected.logits.tobytes()
        assert got.states.tobytes() == expected.states.tobytes()


@pytest.mark.parametrize("runtime", [SCAN, Slowed("slow", 0.001, 0.002)])
def test_the_cost_of_ticks_is_fitted(runtime: Runtime) -> None:
    cost = tick_cost(runtime, SPEC, 64)
    assert cost.seconds(64, 16) >= cost.seconds(64, 1) >= cost.fixed > 0
    assert cost.seconds(1, 1) > 0
