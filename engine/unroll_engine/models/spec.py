"""Values of every model: its name, its sizes, its state."""

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from unroll_proto.step_model import WHOLE

Float32Array = NDArray[np.float32]

State = tuple[NDArray[Any], ...]
"""The recurrent state: one array for each state tensor of the model.

For one sequence each array is [rows, size], the `shape` of its StateTensor; in a tick, [rows, lanes, size].
"""


STATES: dict[str, tuple[str, ...]] = {
    "simple_rnn": ("state",),
    "simple_lstm": ("state", "cell"),
    "simple_gru": ("state",),
}
"""Names of the state tensors of each trained architecture: the hidden state, and the cell state of an LSTM."""

_FLOAT32 = np.dtype(np.float32)


class Tensor(NamedTuple):
    """An input or output of a timestep. On the wire all are float32, flattened and concatenated."""

    name: str
    shape: tuple[int, ...]
    """Shape for one timestep of one sequence."""
    dtype: np.dtype[Any] = _FLOAT32
    """Number format in the graph."""


class StateTensor(NamedTuple):
    """A tensor of a model's state."""

    name: str
    """Name, unique in the model; a trained network's graph has an input `initial_NAME` and an output `final_NAME`."""
    shape: tuple[int, int]
    """Shape for one sequence: sizes before and after the axis of lanes; [num_layers, hidden_size] of our own cells."""
    dtype: np.dtype[Any] = _FLOAT32
    initial: NDArray[Any] | None = None
    """Value before the first step, of `shape`; None for zeros."""

    @property
    def nbytes(self) -> int:
        """Bytes for one sequence."""
        return self.shape[0] * self.shape[1] * self.dtype.itemsize


class StepSpec(NamedTuple):
    """Tensors of an imported graph: of one timestep, whose state is among its inputs and outputs, or of sequences."""

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    """Outputs; the first holds the logits or probabilities of the classes, if the model has labels."""
    states: tuple[StateTensor, ...]
    probabilities: bool
    """True if the first output holds probabilities."""
    form: str
    """Origin of the graph, as in the manifest."""
    source_sha256: str
    """Checksum of the imported file."""


class ModelKey(NamedTuple):
    """Name and version of a model."""

    name: str
    version: int

    def __str__(self) -> str:
        return f"{self.name}/{self.version}"


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Sizes, labels and names of a model, from its manifest.

    `bundle` is the first 16 bytes of the SHA-256 of the manifest, which has the checksum of every other file. It
    distinguishes contents of one version; empty if the model is not from a bundle. `step` is None for a trained
    network. A step model has no names of features; its `hidden_size` and `num_layers` are 0.
    """

    key: ModelKey
    architecture: str
    input_size: int
    hidden_size: int
    output_size: int
    num_layers: int
    class_labels: tuple[str, ...]
    feature_names: tuple[str, ...]
    bundle: bytes = b""
    step: StepSpec | None = field(default=None, compare=False)

    @property
    def whole(self) -> bool:
        """True if it takes whole sequences only: it looks at more than the past, and has no state."""
        return self.step is not None and self.step.form == WHOLE

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """Inputs of a timestep, `input_size` values together."""
        return self.step.inputs if self.step else (Tensor("input", (self.input_size,)),)

    @property
    def outputs(self) -> tuple[Tensor, ...]:
        """Outputs of a timestep, or of a whole sequence, `output_size` values together: logits, or by name."""
        return self.step.outputs if self.step else (Tensor("logits", (self.output_size,)),)

    @property
    def states(self) -> tuple[StateTensor, ...]:
        """Tensors of the state."""
        if self.step:
            return self.step.states
        return tuple([StateTensor(name, (self.num_layers, self.hidden_size)) for name in STATES[self.architecture]])

    def initial_state(self, lanes: int) -> State:
        """Returns the state of `lanes` sequences before their first steps, [rows, lanes, size] each."""
        state = []
        for tensor in self.states:
            rows, size = tensor.shape
            array = np.zeros((rows, lanes, size), tensor.dtype)
            if tensor.initial is not None:
                array[:] = tensor.initial[:, np.newaxis]
            state.append(array)
        return tuple(state)

    def named_outputs(self, rows: Float32Array) -> dict[str, Float32Array]:
        """Splits the outputs of timesteps, [steps, output_size], by name; each is [steps, *shape]."""
        named = {}
        begin = 0
        for name, shape, _ in self.outputs:
            end = begin + math.prod(shape)
            named[name] = rows[:, begin:end].reshape(-1, *shape)
            begin = end
        return named
