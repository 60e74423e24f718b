"""`model.onnx`: valid, standard, dynamic, and the same bytes for the same model."""

import numpy as np
import onnx
import pytest
import torch
from support.models import random_network

from unroll_engine.runtimes.onnx import OnnxOperatorRuntime
from unroll_export.graphs.onnx_rnn import build_onnx_rnn
from unroll_export.graphs.tensors import input_shapes, output_shapes
from unroll_export.parity.runners import EagerRunner, RuntimeRunner

SIZES = [(3, 8, 4, 1), (1, 1, 1, 1), (12, 7, 1, 2), (5, 16, 2, 3)]


def shapes(values: list[onnx.ValueInfoProto]) -> dict[str, tuple[str | int, ...]]:
    return {
        value.name: tuple(size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim)
        for value in values
    }


@pytest.mark.parametrize("sizes", SIZES)
def test_is_valid_and_states_its_tensors(sizes: tuple[int, int, int, int]) -> None:
    network = random_network(*sizes)
    proto = onnx.load_from_string(build_onnx_rnn(network))
    onnx.checker.check_model(proto, full_check=True)
    assert shapes(list(proto.graph.input)) == input_shapes(network)
    assert shapes(list(proto.graph.output)) == output_shapes(network)
    assert proto.doc_string
    assert {entry.key: entry.value for entry in proto.metadata_props}["num_layers"] == str(sizes[3])


def test_uses_standard_operators_only() -> None:
    proto = onnx.load_from_string(build_onnx_rnn(random_network(layers=2)))
    assert [opset.domain for opset in proto.opset_import] == [""]
    assert not proto.functions
    assert [node.op_type for node in proto.graph.node].count("RNN") == 2


def test_the_same_model_gives_the_same_bytes() -> None:
    assert build_onnx_rnn(random_network(seed=3)) == build_onnx_rnn(random_network(seed=3))
    assert build_onnx_rnn(random_network(seed=3)) != build_onnx_rnn(random_network(seed=4))


@pytest.mark.parametrize("sizes", SIZES)
def test_computes_what_eager_does(sizes: tuple[int, int, int, int]) -> None:
    network = random_network(*sizes)
    rng = np.random.default_rng(1)
    runner, eager = RuntimeRunner(OnnxOperatorRuntime(build_onnx_rnn(network)), sizes[3]), EagerRunner(network)
    for batch, time in [(1, 1), (1, 9), (5, 1), (4, 13)]:
        x = rng.standard_normal((batch, time, sizes[0]), np.float32)
        state = rng.uniform(-1, 1, (sizes[3], batch, sizes[1])).astype(np.float32)
        for got, expected in zip(runner.run(x, state), eager.run(x, state), strict=True):
            assert got.shape == expected.shape
            np.testing.assert_allclose(got, expected, rtol=0, atol=2e-6)


def test_standardizes_large_offsets_as_eager_does() -> None:
    network = random_network()
    network.mean.copy_(torch.tensor([1e6, -3e5, 20.0]))
    network.std.copy_(torch.tensor([1e-2, 1e3, 5.0]))
    x = (network.mean + network.std * torch.randn(4, 6, 3, generator=torch.manual_seed(0))).numpy()
    state = np.zeros((1, 4, 8), np.float32)
    got = RuntimeRunner(OnnxOperatorRuntime(build_onnx_rnn(network)), 1).run(x, state)
    np.testing.assert_allclose(got.states, EagerRunner(network).run(x, state).states, rtol=0, atol=2e-6)
