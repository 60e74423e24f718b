"""Values that every room of the server speaks of."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Float32Array = NDArray[np.float32]

State = tuple[Float32Array, ...]
"""The recurrent state of one sequence, or of all lanes of a tick: one array a state tensor of the cell.

Of one sequence each array is [num_layers, hidden_size]; of a tick, [num_layers, lanes, hidden_size].
"""


class ModelKey(NamedTuple):
    """Names one model version."""

    name: str
    version: int

    def __str__(self) -> str:
        return f"{self.name}/{self.version}"


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """What a model takes and gives, from its manifest.

    `bundle` is the first 16 bytes of the SHA-256 of the manifest, which vouches for every other file: it tells contents
    of one version apart. Empty where there is no bundle.
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
    def state_shapes(self) -> tuple[tuple[int, int], ...]:
        """Shape of each state tensor of one sequence: one [num_layers, hidden_size] for an RNN."""
        return ((self.num_layers, self.hidden_size),)

    def zero_state(self, lanes: int) -> State:
        """The state of `lanes` sequences that have consumed nothing, [num_layers, lanes, hidden_size] each."""
        return tuple(np.zeros((layers, lanes, size), np.float32) for layers, size in self.state_shapes)
