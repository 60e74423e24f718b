"""Values of every model: its name, its sizes, its state."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Float32Array = NDArray[np.float32]

State = tuple[Float32Array, ...]
"""The recurrent state: one array for each state tensor of the model.

For one sequence each array is [num_layers, hidden_size]; in a tick, [num_layers, lanes, hidden_size].
"""


STATES: dict[str, tuple[str, ...]] = {
    "simple_rnn": ("state",),
    "simple_lstm": ("state", "cell"),
    "simple_gru": ("state",),
}
"""Names of the state tensors of each architecture: the hidden state, and the cell state of an LSTM."""


class StateTensor(NamedTuple):
    """A tensor of a model's state: float32, zeros at the beginning of a sequence."""

    name: str
    """Name, unique in the model; a graph's input is `initial_NAME`, its output `final_NAME`."""
    shape: tuple[int, int]
    """Shape for one sequence, [num_layers, hidden_size]; in a tick, the axis of lanes is between them."""


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
    distinguishes contents of one version; empty if the model is not from a bundle.
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

    @property
    def states(self) -> tuple[StateTensor, ...]:
        """The state: one tensor, or two of an LSTM."""
        return tuple([StateTensor(name, (self.num_layers, self.hidden_size)) for name in STATES[self.architecture]])

    def zero_state(self, lanes: int) -> State:
        """Returns the initial state of `lanes` sequences, [num_layers, lanes, hidden_size] each."""
        return tuple([np.zeros((layers, lanes, size), np.float32) for _, (layers, size) in self.states])
