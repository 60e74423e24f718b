"""The states of lanes in arrays: those of a runtime that takes and returns arrays."""

import numpy as np

from unroll_engine.models.spec import Float32Array, State
from unroll_engine.runtimes.base import DeviceRuntime, LaneIndex, LaneState, Runtime, TickResult, Values


def lane_state(runtime: Runtime, initial: State, lanes: int, rows: int, input_size: int) -> LaneState:
    """Makes the memory for lanes where a runtime computes; see DeviceRuntime.lane_state."""
    if isinstance(runtime, DeviceRuntime):
        return runtime.lane_state(initial, lanes, rows, input_size)
    return LaneArrays(runtime, initial, lanes, rows, input_size)


class LaneArrays:
    """States of lanes in host memory; see LaneState.

    Args:
        runtime: Computes the timesteps.
        initial: See DeviceRuntime.lane_state, as the following.
        lanes: Number of lanes.
        rows: Rows of `inputs`.
        input_size: Width of those.
    """

    def __init__(self, runtime: Runtime, initial: State, lanes: int, rows: int, input_size: int) -> None:
        self.inputs = np.zeros((rows, input_size), np.float32)
        self._runtime = runtime
        self._initial = initial
        self._state = tuple(np.zeros((each.shape[0], lanes, each.shape[2]), each.dtype) for each in initial)

    def put(self, lanes: LaneIndex, state: State | None) -> None:
        """See LaneState.put."""
        for array, values in zip(self._state, state or self._initial, strict=True):
            array[:, lanes] = values

    def move(self, lanes: LaneIndex, to: LaneIndex) -> None:
        """See LaneState.move."""
        for array in self._state:
            array[:, to] = array[:, lanes]

    def take(self, lanes: LaneIndex) -> State:
        """See LaneState.take."""
        return tuple(array[:, lanes] for array in self._state)

    def run(self, x: Float32Array) -> TickResult[Values]:
        """See LaneState.run."""
        return self._runtime.run(x, tuple(np.ascontiguousarray(array[:, : x.shape[1]]) for array in self._state))

    def keep(self, final_state: tuple[Values, ...]) -> None:
        """See LaneState.keep."""
        for array, final in zip(self._state, final_state, strict=True):
            values = np.asarray(final)
            array[:, : values.shape[1]] = values
