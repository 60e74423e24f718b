"""A common interface to eager PyTorch and each artifact, with batch-major arrays.

The state is one array, [layers, batch, hidden_size]; for an LSTM [2 * layers, ...], hidden states before cells.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, TypeAlias, cast

import numpy as np
import torch
from numpy.typing import NDArray

from unroll_engine.kernel.exact import ExactNetwork, Float64Array, Matrix, Near, Sums
from unroll_engine.kernel.weights import Cell
from unroll_engine.models.spec import State
from unroll_engine.runtimes.base import Runtime, on_host
from unroll_engine.runtimes.kernel import KernelRuntime
from unroll_engine.runtimes.torchscript import TorchScriptRuntime
from unroll_export.model import RecurrentClassifier
from unroll_proto.v1 import bundle_pb2 as pb

Float32Array = NDArray[np.float32]
Kind: TypeAlias = "pb.ArtifactKind.ValueType"


def _operator(content: bytes) -> Runtime:
    # A machine that proves TorchScript on a card may lack onnxruntime.
    from unroll_engine.runtimes.onnx import OnnxOperatorRuntime

    return OnnxOperatorRuntime(content)


def _scan(content: bytes) -> Runtime:
    from unroll_engine.runtimes.onnx import OnnxCpuRuntime

    return OnnxCpuRuntime(content)


RUNTIMES: Mapping[Kind, Mapping[str, Callable[[bytes], Runtime]]] = {
    pb.ARTIFACT_KIND_ONNX_RNN: {"onnx": _operator, "scan": _scan, "kernel": KernelRuntime},
    pb.ARTIFACT_KIND_TORCHSCRIPT: {"torchscript": TorchScriptRuntime},
}
"""Runtimes that serve each model artifact on the CPU, by their name in the proof."""


class ParityError(Exception):
    """An artifact differs from eager PyTorch; the message is one line with the place."""


class Outputs(NamedTuple):
    """Results of one call."""

    logits: Float32Array
    """[batch, time, output_size]."""
    states: Float32Array
    """State of the last layer, [batch, time, hidden_size]."""
    final_state: Float32Array
    """State of every layer after the last step."""


class Runner(Protocol):
    """Runs one form of a model."""

    def run(self, x: Float32Array, initial_state: Float32Array) -> Outputs:
        """Computes every step of `x` [batch, time, features] from `initial_state`."""
        ...


class EagerRunner:
    """Eager PyTorch: RecurrentClassifier.unroll."""

    def __init__(self, model: RecurrentClassifier[Any]) -> None:
        self._model = model
        self._layers = model.rnn.num_layers

    def run(self, x: Float32Array, initial_state: Float32Array) -> Outputs:
        """See Runner.run."""
        with torch.inference_mode():
            state = [torch.from_numpy(part) for part in tensors_of(initial_state, self._layers)]
            given = state[0] if len(state) == 1 else tuple(state)
            logits, states, final = self._model.unroll(torch.from_numpy(x), given)
            final = final if isinstance(final, torch.Tensor) else torch.cat(final)
        return Outputs(logits.numpy(), states.numpy(), final.numpy())


class RuntimeRunner:
    """An artifact in the engine's runtime that serves it."""

    def __init__(self, runtime: Runtime, layers: int) -> None:
        self._runtime, self._layers = runtime, layers

    def run(self, x: Float32Array, initial_state: Float32Array) -> Outputs:
        """See Runner.run."""
        result = on_host(self._runtime.run(_swapped(x), tensors_of(initial_state, self._layers)))
        return Outputs(_swapped(result.logits), _swapped(result.states), np.concatenate(result.final_state))


def tensors_of(state: Float32Array, layers: int) -> State:
    """Splits a state into its tensors, [layers, batch, hidden_size] each."""
    return tuple([np.ascontiguousarray(state[start : start + layers]) for start in range(0, len(state), layers)])


def exact_network(model: RecurrentClassifier[Any]) -> ExactNetwork:
    """Makes the network in float64."""
    cell = cast("Cell", model.rnn.mode.lower())
    weights = {name: value.numpy() for name, value in model.state_dict().items()}

    def matrix(of: str, layer: int) -> Matrix:
        return Matrix(weights[f"rnn.weight_{of}_l{layer}"], weights[f"rnn.bias_{of}_l{layer}"])

    layers = [(matrix("ih", layer), matrix("hh", layer)) for layer in range(model.rnn.num_layers)]
    readout = Matrix(weights["fc.weight"], weights["fc.bias"])
    return ExactNetwork(cell, (weights["mean"], weights["std"]), layers, readout)


def exact_step(exact: ExactNetwork, inputs: Sums, state: Float32Array | Float64Array) -> Near:
    """Computes one step in float64."""
    layers = len(exact.layers)
    parts = exact.step(inputs, [state[start : start + layers] for start in range(0, len(state), layers)])
    return Near(np.concatenate([part.value for part in parts]), np.concatenate([part.off for part in parts]))


def _swapped(array: Float32Array) -> Float32Array:
    """Converts time-major to batch-major arrays, and back."""
    return np.ascontiguousarray(array.swapaxes(0, 1))
