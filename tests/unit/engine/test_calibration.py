"""Calibration of a model: cost of ticks, bits, correct results."""

import dataclasses

import numpy as np
import pytest
import torch
from support.models import random_network

from unroll_engine.kernel import read_onnx
from unroll_engine.models.calibration import difference_of, keeps_bits, tick_cost
from unroll_engine.models.spec import Float32Array, ModelKey, ModelSpec, State
from unroll_engine.runtimes.base import ArrayResult, Runtime, TickResult
from unroll_engine.runtimes.onnx import OnnxCpuRuntime, OnnxOperatorRuntime
from unroll_export.graphs.onnx_rnn import build_onnx_rnn

SPEC = ModelSpec(ModelKey("m", 1), "simple_rnn", 3, 8, 4, 1, ("a",) * 4, ("x",) * 3)
CONTENT = build_onnx_rnn(random_network(features=3, hidden=8, outputs=4))
SCAN, OPERATOR = OnnxCpuRuntime(CONTENT), OnnxOperatorRuntime(CONTENT)


class Leaking(OnnxCpuRuntime):
    """A runtime that changes one bit in the states of wide ticks."""

    def run(self, x: Float32Array, state: State) -> ArrayResult:
        logits, states, final = super().run(x, state)
        return TickResult(logits, np.nextafter(states, np.float32(2)) if x.shape[1] > 2 else states, final)


def test_only_the_same_bits_at_every_number_of_lanes_are_kept() -> None:
    assert keeps_bits(SCAN, SPEC, 80)
    assert not keeps_bits(Leaking(CONTENT), SPEC, 80)


def test_the_forms_of_one_network_do_not_differ_and_those_of_two_do() -> None:
    weights = read_onnx(CONTENT)
    assert difference_of(SCAN, OPERATOR, weights, SPEC) == ""
    network = random_network(features=3, hidden=8, outputs=4)
    with torch.no_grad():
        network.fc.weight[2, 3] *= 1.0001
    other = OnnxOperatorRuntime(build_onnx_rnn(network))
    assert "its logits differ from those of model.onnx by " in difference_of(SCAN, other, weights, SPEC)


def test_honest_rounding_of_wide_inputs_is_no_difference() -> None:
    content = build_onnx_rnn(random_network(features=8000, hidden=8, outputs=4))
    spec = dataclasses.replace(SPEC, input_size=8000)
    runtimes = OnnxCpuRuntime(content), OnnxOperatorRuntime(content)
    assert difference_of(*runtimes, read_onnx(content), spec) == ""


@pytest.mark.parametrize("runtime", [SCAN, OPERATOR])
def test_the_cost_of_ticks_is_fitted(runtime: Runtime) -> None:
    cost = tick_cost(runtime, SPEC, 64)
    assert cost.seconds(64, 16) >= cost.seconds(64, 1) >= cost.fixed > 0
    assert cost.seconds(1, 1) > 0
