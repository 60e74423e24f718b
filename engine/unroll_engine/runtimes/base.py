"""The contract between the engine and a runtime."""

from collections.abc import Sequence
from typing import Any, Generic, NamedTuple, Protocol, TypeAlias, TypeVar, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from unroll_engine.models.spec import Float32Array, State


class Values(Protocol):
    """An array, or values in the memory of a device.

    Indexing, as that of an array, copies the chosen values of a device to the host; `numpy.asarray` copies all.
    """

    def __getitem__(self, key: Any, /) -> Any: ...

    def __array__(self, dtype: None = ..., /, *, copy: bool | None = ...) -> NDArray[Any]: ...


ValuesT = TypeVar("ValuesT", bound=Values, covariant=True)


class TickResult(NamedTuple, Generic[ValuesT]):
    """The results of one run, of every lane at every step."""

    logits: ValuesT
    """float32 [steps, lanes, output_size]."""
    states: ValuesT
    """State of the last layer, float32 [steps, lanes, hidden_size]."""
    final_state: tuple[ValuesT, ...]
    """State of every layer after the last step, [num_layers, lanes, hidden_size] each."""


ArrayResult: TypeAlias = TickResult[NDArray[Any]]
"""A result in arrays, of a runtime on the CPU."""


def on_host(result: TickResult[Values]) -> ArrayResult:
    """Copies a result to arrays; of arrays, nothing is copied."""
    return TickResult(np.asarray(result.logits), np.asarray(result.states), tuple(map(np.asarray, result.final_state)))


class Runtime(Protocol):
    """Computes timesteps of one model. State is an argument, never an attribute, so that calls are independent."""

    name: str
    """"kernel", "onnx" or "torchscript"."""
    device: str
    """"cpu" or "cuda"."""
    artifact: str
    """File of the bundle that it runs."""
    bitwise: bool
    """True if it claims the same bits for a lane in any tick, wherever the sequence is cut."""
    variant: str
    """Instruction set that the kernel uses; empty for other runtimes."""

    def run(self, x: Float32Array, state: State) -> TickResult[Values]:
        """Computes `steps` timesteps of `lanes` sequences.

        Args:
            x: [steps, lanes, input_size], C-contiguous, raw features.
            state: [num_layers, lanes, hidden_size] each.
        """
        ...


LaneIndex: TypeAlias = slice | Sequence[int] | NDArray[np.int64]
"""Numbers of lanes."""


class LaneState(Protocol):
    """The states of lanes between ticks, kept where a runtime computes."""

    inputs: Float32Array
    """Memory for the input of a tick, float32 [rows, input_size]."""

    def put(self, lanes: LaneIndex, state: State | None) -> None:
        """Sets the states of lanes, [rows, lanes, size] each; None for the state before the first step."""
        ...

    def move(self, lanes: LaneIndex, to: LaneIndex) -> None:
        """Copies the states of lanes to other lanes."""
        ...

    def take(self, lanes: LaneIndex) -> State:
        """Returns copies of the states of lanes, [rows, lanes, size] each."""
        ...

    def run(self, x: Float32Array) -> TickResult[Values]:
        """Computes timesteps of the first lanes; their states stay as they are until `keep`.

        Args:
            x: A view of `inputs`, [steps, lanes, input_size].
        """
        ...

    def keep(self, final_state: tuple[Values, ...]) -> None:
        """Replaces the states of the lanes of the last run by those after it, as in its result."""
        ...


@runtime_checkable
class DeviceRuntime(Runtime, Protocol):
    """A runtime that keeps the states of lanes in the memory of its device."""

    def lane_state(self, initial: State, lanes: int, rows: int, input_size: int) -> LaneState:
        """Makes the memory for lanes.

        Args:
            initial: The state of one lane before its first step, [rows, 1, size] each.
            lanes: Number of lanes.
            rows: Rows of `LaneState.inputs`.
            input_size: Width of those.
        """
        ...
