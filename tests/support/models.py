"""Models for tests of the server's rooms: random weights, in the runtime that serves them."""

from typing import Any

import numpy as np
import torch

from unroll_engine.kernel import unavailable_reason
from unroll_engine.models.loader import Model
from unroll_engine.models.spec import Float32Array, ModelKey, ModelSpec, State
from unroll_engine.runtimes.base import Runtime
from unroll_engine.runtimes.kernel import KernelRuntime
from unroll_engine.runtimes.onnx import OnnxCpuRuntime
from unroll_engine.scheduler import TickCost
from unroll_export import SimpleRNN
from unroll_export.graphs.onnx_rnn import build_onnx_rnn
from unroll_export.model import Cell, Nonlinearity, RecurrentClassifier, build


def random_network(features: int = 3, hidden: int = 8, outputs: int = 4, layers: int = 1, seed: int = 0) -> SimpleRNN:
    """Makes a network whose weights depend only on the arguments."""
    network = random_classifier("rnn", features, hidden, outputs, layers, seed)
    assert isinstance(network, SimpleRNN)
    return network


def random_classifier(
    cell: Cell,
    features: int = 3,
    hidden: int = 8,
    outputs: int = 4,
    layers: int = 1,
    seed: int = 0,
    nonlinearity: Nonlinearity = "tanh",
) -> RecurrentClassifier[Any]:
    """Makes a network of any cell, likewise."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = build(cell, features, hidden, outputs, layers, nonlinearity=nonlinearity).eval()
        network.mean.uniform_(-1, 1)
        network.std.uniform_(0.5, 2)
    return network


def default_runtime(content: bytes) -> Runtime:
    """Makes the default runtime of a `model.onnx`, given its content."""
    return OnnxCpuRuntime(content) if unavailable_reason() else KernelRuntime(content)


def served(
    network: RecurrentClassifier[Any], name: str = "m", version: int = 1, runtime: Runtime | None = None
) -> Model:
    """Makes the served model of a network."""
    outputs = network.fc.out_features
    spec = ModelSpec(
        key=ModelKey(name, version),
        architecture=network.architecture,
        input_size=network.rnn.input_size,
        hidden_size=network.rnn.hidden_size,
        output_size=outputs,
        num_layers=network.rnn.num_layers,
        class_labels=tuple(f"class {index}" for index in range(max(outputs, 2))),
        feature_names=tuple(f"feature {index}" for index in range(network.rnn.input_size)),
    )
    runtime = runtime or default_runtime(build_onnx_rnn(network))
    cost = TickCost(30e-6, 3e-6, 0.2e-6)
    return Model(spec, runtime, bitwise=runtime.bitwise, max_abs_diff=0.0, test_accuracy=None, cost=cost)


def alone(model: Model, values: Float32Array, state: State | None) -> tuple[Float32Array, Float32Array, State]:
    """Runs one sequence in one call of the runtime, past the engine.

    Args:
        model: The model.
        values: [steps, input_size].
        state: [num_layers, hidden_size] each; None is the zero state.

    Returns:
        logits [steps, output_size], states [steps, hidden_size], final state [num_layers, hidden_size] each.
    """
    initial = model.spec.initial_state(1) if state is None else tuple(array[:, np.newaxis] for array in state)
    result = model.runtime.run(values[:, np.newaxis], initial)
    return result.logits[:, 0], result.states[:, 0], tuple(array[:, 0] for array in result.final_state)
