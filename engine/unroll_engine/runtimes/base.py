"""The contract between the engine and whatever runs a model."""

from typing import NamedTuple, Protocol

from unroll_engine.models.spec import Float32Array, State


class TickResult(NamedTuple):
    """What one run computed for every lane at every step."""

    logits: Float32Array
    """[steps, lanes, output_size]."""
    states: Float32Array
    """State of the last layer, [steps, lanes, hidden_size]."""
    final_state: State
    """State of every layer after the last step, [num_layers, lanes, hidden_size] each."""


class Runtime(Protocol):
    """Runs one model. State is an argument, never an attribute: two calls do not know of each other."""

    name: str
    """"onnx" or "torchscript"."""
    device: str
    """"cpu" or "cuda"."""
    artifact: str
    """File of the bundle that is run."""
    bitwise: bool
    """Whether a lane's result claims the same bits whatever shares the tick and wherever it is cut."""

    def run(self, x: Float32Array, state: State) -> TickResult:
        """Computes `steps` timesteps of `lanes` sequences.

        Args:
            x: [steps, lanes, input_size], C-contiguous, raw features.
            state: [num_layers, lanes, hidden_size] each.
        """
        ...
