"""One way to run eager PyTorch and each artifact: batch-major arrays in, batch-major arrays out."""

from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from unroll_export.graphs.tensors import INITIAL_STATE, INPUT, OUTPUTS
from unroll_export.graphs.torchscript import load_torchscript
from unroll_export.model import SimpleRNN
from unroll_export.onnx_session import open_session
from unroll_proto import bundle
from unroll_proto.v1 import bundle_pb2 as pb

Float32Array = NDArray[np.float32]


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


class TorchScriptRunner:
    """`model.ts` as torch loads it."""

    def __init__(self, content: bytes) -> None:
        self._module = load_torchscript(content)

    def run(self, x: Float32Array, initial_state: Float32Array) -> Outputs:
        """See Runner.run."""
        with torch.inference_mode():
            outputs = self._module(torch.from_numpy(x), torch.from_numpy(initial_state))
        return Outputs(*(output.numpy() for output in outputs))


class OnnxRunner:
    """An ONNX artifact in ONNX Runtime on the CPU.

    Args:
        content: The serialized model.
        time_major: Whether its `input`, `logits` and `states` are [time, batch, ...].
    """

    def __init__(self, content: bytes, time_major: bool) -> None:
        self._session = open_session(content)
        self._time_major = time_major

    def run(self, x: Float32Array, initial_state: Float32Array) -> Outputs:
        """See Runner.run."""
        feeds = {INPUT: self._swapped(x), INITIAL_STATE: np.ascontiguousarray(initial_state)}
        logits, states, final_state = self._session.run(list(OUTPUTS), feeds)
        return Outputs(self._swapped(logits), self._swapped(states), final_state)

    def _swapped(self, array: Float32Array) -> Float32Array:
        return np.ascontiguousarray(array.swapaxes(0, 1) if self._time_major else array)


def open_runner(kind: pb.ArtifactKind.ValueType, content: bytes) -> Runner:
    """Loads a model artifact.

    Raises:
        ParityError: its runtime can't load it.
    """
    try:
        if kind == pb.ARTIFACT_KIND_TORCHSCRIPT:
            return TorchScriptRunner(content)
        return OnnxRunner(content, time_major=kind == pb.ARTIFACT_KIND_ONNX_SCAN)
    except Exception as error:  # the runtimes raise classes of their own, without a common base
        raise ParityError(f"{bundle.FILES[kind]}: can't be loaded: {' '.join(str(error).split())}") from error
