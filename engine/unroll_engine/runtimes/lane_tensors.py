"""The states of lanes in the memory of a device: only those that begin or that are wanted cross its bus."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from unroll_engine.models.spec import Float32Array, State
from unroll_engine.runtimes.base import LaneIndex, TickResult, Values


class DeviceValues:
    """Values in the memory of a device; see Values. Few of a tick's results are read, so most stay there.

    Args:
        tensor: The values.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def __getitem__(self, key: Any) -> NDArray[Any]:
        parts = key if isinstance(key, tuple) else (key,)
        lists = [place for place, part in enumerate(parts) if isinstance(part, (list, np.ndarray))]
        if lists:
            # One copy to the device for all of them.
            together = torch.from_numpy(np.stack([parts[place] for place in lists])).to(self.tensor.device)
            moved = dict(zip(lists, together.unbind(), strict=True))
            parts = tuple([moved.get(place, part) for place, part in enumerate(parts)])
        return self.tensor[parts].cpu().numpy()

    def __array__(self, dtype: None = None, /, *, copy: bool | None = None) -> NDArray[Any]:
        return self.tensor.cpu().numpy()


Compute = Callable[[torch.Tensor, list[torch.Tensor]], TickResult[DeviceValues]]
"""Computes timesteps of inputs in host memory, [steps, lanes, input_size], and states on the device."""


class LaneTensors:
    """States of lanes on a device; see LaneState.

    Args:
        compute: Computes timesteps, and ends when they are computed.
        device: "cuda"; or "cpu", which the tests use where there is no card.
        initial: See DeviceRuntime.lane_state, as the following.
        lanes: Number of lanes.
        rows: Rows of `inputs`.
        input_size: Width of those.
    """

    def __init__(self, compute: Compute, device: str, initial: State, lanes: int, rows: int, input_size: int) -> None:
        # Locked pages, from which the card copies by itself.
        self.inputs = torch.zeros(rows, input_size, pin_memory=device == "cuda").numpy()
        self._compute = compute
        self._initial = [torch.from_numpy(each).to(device) for each in initial]
        self._state = [each.expand(-1, lanes, -1).clone() for each in self._initial]

    def put(self, lanes: LaneIndex, state: State | None) -> None:
        """See LaneState.put."""
        given = self._initial if state is None else [torch.tensor(array) for array in state]
        index = self._index(lanes)
        for tensor, values in zip(self._state, given, strict=True):
            tensor[:, index] = values.to(tensor.device)

    def move(self, lanes: LaneIndex, to: LaneIndex) -> None:
        """See LaneState.move."""
        source, target = self._index(lanes), self._index(to)
        for tensor in self._state:
            tensor[:, target] = tensor[:, source]

    def take(self, lanes: LaneIndex) -> State:
        """See LaneState.take."""
        index = self._index(lanes)
        return tuple([tensor[:, index].to("cpu", copy=True).numpy() for tensor in self._state])

    def run(self, x: Float32Array) -> TickResult[Values]:
        """See LaneState.run."""
        lanes = x.shape[1]
        return self._compute(torch.from_numpy(x), [tensor[:, :lanes].contiguous() for tensor in self._state])

    def keep(self, final_state: tuple[Values, ...]) -> None:
        """See LaneState.keep."""
        for tensor, final in zip(self._state, final_state, strict=True):
            assert isinstance(final, DeviceValues)
            tensor[:, : final.tensor.shape[1]] = final.tensor

    def _index(self, lanes: LaneIndex) -> Any:
        return lanes if isinstance(lanes, slice) else torch.as_tensor(lanes, device=self._state[0].device)
