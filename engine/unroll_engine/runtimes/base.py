"""The contract between the engine and a runtime."""

from typing import NamedTuple, Protocol

from unroll_engine.models.spec import Float32Array, State


class TickResult(NamedTuple):
    """The results of one run, of every lane at every step."""

    logits: Float32Array
    """[steps, lanes, output_size]."""
    states: Float32Array
    """State of the last layer, [steps, lanes, hidden_size]."""
    final_state: State
    """State of every layer after the last step, [num_layers, lanes, hidden_size] each."""


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

    def run(self, x: Float32Array, state: State) -> TickResult:
        """Computes `steps` timesteps of `lanes` sequences.

        Args:
            x: [steps, lanes, input_size], C-contiguous, raw features.
            state: [num_layers, lanes, hidden_size] each.
        """
        ...
