"""One way to run eager PyTorch and each artifact: batch-major arrays in, batch-major arrays out."""

from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from unroll_engine.kernel.exact import ExactNetwork, Matrix
from unroll_engine.runtimes.base import Runtime
from unroll_engine.runtimes.kernel import KernelRuntime
from unroll_engine.runtimes.onnx import OnnxCpuRuntime, OnnxOperatorRuntime
from unroll_engine.runtimes.torchscript import TorchScriptRuntime
from unroll_export.model import SimpleRNN
from unroll_proto.v1 import bundle_pb2 as pb

Float32Array = NDArray[np.float32]
Kind: TypeAlias = "pb.ArtifactKind.ValueType"

RUNTIMES: Mapping[Kind, Mapping[str, Callable[[bytes], Runtime]]] = {
    pb.ARTIFACT_KIND_ONNX_RNN: {"onnx": OnnxOperatorRuntime, "scan": OnnxCpuRuntime, "kernel": KernelRuntime},
    pb.ARTIFACT_KIND_TORCHSCRIPT: {"torchscript": lambda content: TorchScriptRuntime(content, "cpu")},
}
"""What serves each model artifact on the CPU, by the name that the proof gives it."""


class ParityError(Exception):
    """An artifact doesn't compute what eager PyTorch computes; the message is one line that says where."""


class Outputs(NamedTuple):
    """What one call computes."""

    logits: Float32Array
    """[batch, time, output_size]."""
    states: Float32Array
    """State of the last layer, [batch, time, hidden_size]."""
    final_state: Float32Array
    """State of every layer after the last step, [num_layers, batch, hidden_size]."""


class Runner(Protocol):
    """Runs one form of a model."""

    def run(self, x: Float32Array, initial_state: Float32Array) -> Outputs:
        """Computes every step of `x` [batch, time, features] from `initial_state` [layers, batch, hidden]."""
        ...


class EagerRunner:
    """SimpleRNN.unroll itself."""

    def __init__(self, model: SimpleRNN) -> None:
        self._model = model

    def run(self, x: Float32Array, initial_state: Float32Array) -> Outputs:
        """See Runner.run."""
        with torch.inference_mode():
            outputs = self._model.unroll(torch.from_numpy(x), torch.from_numpy(initial_state))
        return Outputs(*(output.numpy() for output in outputs))


class RuntimeRunner:
    """An artifact in a runtime of the engine, as it is served."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime

    def run(self, x: Float32Array, initial_state: Float32Array) -> Outputs:
        """See Runner.run."""
        logits, states, (final,) = self._runtime.run(_swapped(x), (np.ascontiguousarray(initial_state),))
        return Outputs(_swapped(logits), _swapped(states), final)


def exact_network(model: SimpleRNN) -> ExactNetwork:
    """The network in float64."""
    weights = {name: value.numpy() for name, value in model.state_dict().items()}

    def matrix(of: str, layer: int) -> Matrix:
        return Matrix(weights[f"rnn.weight_{of}_l{layer}"], weights[f"rnn.bias_{of}_l{layer}"])

    layers = [(matrix("ih", layer), matrix("hh", layer)) for layer in range(model.rnn.num_layers)]
    readout = Matrix(weights["fc.weight"], weights["fc.bias"])
    return ExactNetwork("rnn_tanh", (weights["mean"], weights["std"]), layers, readout)


def _swapped(array: Float32Array) -> Float32Array:
    """Time-major for batch-major, and the reverse."""
    return np.ascontiguousarray(array.swapaxes(0, 1))
