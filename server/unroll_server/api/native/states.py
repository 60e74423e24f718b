"""The states of open sequences: a row each, so that those of many are read and written at once."""

from collections.abc import Sequence

import numpy as np

from unroll_engine.models.spec import ModelSpec, State

_FIRST_ROWS = 16
_MOST_NEW_ROWS = 128
"""Most rows added at once: unused ones would be most of what a sequence costs beside its own state."""


class StateTable:
    """The states of the open sequences of one model.

    Args:
        spec: The model.
    """

    def __init__(self, spec: ModelSpec) -> None:
        # [rows, num_layers, hidden_size] each: one that grows need not be copied.
        self._initial = [tensor[:, 0] for tensor in spec.initial_state(1)]
        self._tensors = [np.zeros((_FIRST_ROWS, *each.shape), each.dtype) for each in self._initial]
        self._free = list(range(_FIRST_ROWS))

    def allocate(self) -> int:
        """Returns a row that holds the initial state."""
        if not self._free:
            rows = len(self._tensors[0])
            grown = rows + min(rows // 4, _MOST_NEW_ROWS)
            for tensor in self._tensors:
                tensor.resize((grown, *tensor.shape[1:]), refcheck=False)
            self._free = list(range(rows, grown))
        row = self._free.pop()
        for tensor, initial in zip(self._tensors, self._initial, strict=True):
            tensor[row] = initial
        return row

    def release(self, row: int) -> None:
        """Makes a row available to others."""
        self._free.append(row)

    def read(self, rows: Sequence[int]) -> State:
        """Returns a copy of some states, [num_layers, rows, hidden_size] each."""
        return tuple([np.ascontiguousarray(tensor[rows].swapaxes(0, 1)) for tensor in self._tensors])

    def write(self, rows: Sequence[int], states: State) -> None:
        """Replaces some states, as `read` returns them."""
        for tensor, values in zip(self._tensors, states, strict=True):
            tensor[rows] = values.swapaxes(0, 1)
