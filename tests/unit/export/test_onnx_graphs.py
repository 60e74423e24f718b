"""The two ONNX artifacts: valid, standard, dynamic, and the same bytes for the same model."""

from collections.abc import Callable

import numpy as np
import onnx
import pytest
import torch
from support.models import random_network

from unroll_engine.runtimes.onnx import OnnxCpuRuntime, OnnxOperatorRuntime
from unroll_export import SimpleRNN
from unroll_export.graphs.onnx_rnn import build_onnx_rnn
from unroll_export.graphs.onnx_scan import build_onnx_scan
from unroll_export.graphs.tensors import input_shapes, output_shapes
from unroll_export.parity.runners import EagerRunner, RuntimeRunner

SIZES = [(3, 8, 4, 1), (1, 1, 1, 1), (12, 7, 1, 2), (5, 16, 2, 3)]
BUILDERS = pytest.mark.parametrize(("build", "time_major"), [(build_onnx_rnn, False), (build_onnx_scan, True)])

Build = Callable[[SimpleRNN], bytes]


def operators(graph: onnx.GraphProto) -> set[str]:
    """Of the graph and of the bodies inside."""
    found = {node.op_type for node in graph.node}
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                found |= operators(attribute.g)
    return found


def shapes(values: list[onnx.ValueInfoProto]) -> dict[str, tuple[str | int, ...]]:
    return {
        value.name: tuple(size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim)
        for value in values
    }


@BUILDERS
@pytest.mark.parametrize("sizes", SIZES)
def test_is_valid_and_states_its_tensors(build: Build, time_major: bool, sizes: tuple[int, int, int, int]) -> None:
    network = random_network(*sizes)
    proto = onnx.load_from_string(build(network))
    onnx.checker.check_model(proto, full_check=True)
    assert shapes(list(proto.graph.input)) == input_shapes(network, time_major)
    assert shapes(list(proto.graph.output)) == output_shapes(network, time_major)
    assert proto.doc_string
    assert {entry.key: entry.value for entry in proto.metadata_props}["num_layers"] == str(sizes[3])


@BUILDERS
def test_uses_standard_operators_only(build: Build, time_major: bool) -> None:
    proto = onnx.load_from_string(build(random_network(layers=2)))
    assert [opset.domain for opset in proto.opset_import] == [""]
    assert not proto.functions
    assert ("Scan" in operators(proto.graph)) == time_major
    assert ("RNN" in operators(proto.graph)) == (not time_major)


@BUILDERS
def test_the_same_model_gives_the_same_bytes(build: Build, time_major: bool) -> None:
    assert build(random_network(seed=3)) == build(random_network(seed=3))
    assert build(random_network(seed=3)) != build(random_network(seed=4))


@BUILDERS
@pytest.mark.parametrize("sizes", SIZES)
def test_computes_what_eager_does(build: Build, time_major: bool, sizes: tuple[int, int, int, int]) -> None:
    network = random_network(*sizes)
    rng = np.random.default_rng(1)
    runtime = OnnxCpuRuntime if time_major else OnnxOperatorRuntime
    runner, eager = RuntimeRunner(runtime(build(network))), EagerRunner(network)
    for batch, time in [(1, 1), (1, 9), (5, 1), (4, 13)]:
        x = rng.standard_normal((batch, time, sizes[0]), np.float32)
        state = rng.uniform(-1, 1, (sizes[3], batch, sizes[1])).astype(np.float32)
        for got, expected in zip(runner.run(x, state), eager.run(x, state), strict=True):
            assert got.shape == expected.shape
            np.testing.assert_allclose(got, expected, rtol=0, atol=2e-6)


@BUILDERS
def test_standardizes_large_offsets_as_eager_does(build: Build, time_major: bool) -> None:
    network = random_network()
    network.mean.copy_(torch.tensor([1e6, -3e5, 20.0]))
    network.std.copy_(torch.tensor([1e-2, 1e3, 5.0]))
    x = (network.mean + network.std * torch.randn(4, 6, 3, generator=torch.manual_seed(0))).numpy()
    state = np.zeros((1, 4, 8), np.float32)
    runtime = OnnxCpuRuntime if time_major else OnnxOperatorRuntime
    got = RuntimeRunner(runtime(build(network))).run(x, state)
    np.testing.assert_allclose(got.states, EagerRunner(network).run(x, state).states, rtol=0, atol=2e-6)
