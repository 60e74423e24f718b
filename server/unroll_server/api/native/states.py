"""The states of open sequences: a row each, so that those of many are read and written at once."""

from collections.abc import Sequence

import numpy as np

from unroll_engine.models.spec import ModelSpec, State

_FIRST_ROWS = 16


class StateTable:
    """The states of the open sequences of one model.

    Args:
        spec: The model.
    """

    def __init__(self, spec: ModelSpec) -> None:
        self._initial = spec.initial_state(1)
        self._tensors = spec.initial_state(_FIRST_ROWS)
        self._free = list(range(_FIRST_ROWS))

    def allocate(self) -> int:
        """Returns a row that holds the initial state."""
        if not self._free:
            rows = self._tensors[0].shape[1]
            self._tensors = tuple([np.concatenate([tensor, np.zeros_like(tensor)], 1) for tensor in self._tensors])
            self._free = list(range(rows, 2 * rows))
        row = self._free.pop()
        for tensor, initial in zip(self._tensors, self._initial, strict=True):
            tensor[:, row] = initial[:, 0]
        return row

    def release(self, row: int) -> None:
        """Makes a row available to others."""
        self._free.append(row)

    def read(self, rows: Sequence[int]) -> State:
        """Returns a copy of some states, [num_layers, rows, hidden_size] each."""
        return tuple([tensor[:, rows] for tensor in self._tensors])

    def write(self, rows: Sequence[int], states: State) -> None:
        """Replaces some states, as `read` returns them."""
        for tensor, values in zip(self._tensors, states, strict=True):
            tensor[:, rows] = values
