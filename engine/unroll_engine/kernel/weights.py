"""Weights of a network that the step kernel can run."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from unroll_engine.models.spec import Float32Array

Cell = Literal["rnn_tanh", "rnn_relu", "lstm", "gru", "gru_reset_before"]
"""`gru` multiplies the recurrent product by the reset gate, as PyTorch does; `gru_reset_before` the state before it."""


class UnsupportedNetworkError(ValueError):
    """The step kernel can't express a network. The message names the reason."""


class LayerWeights(NamedTuple):
    """One layer; gates in the order i, f, g, o (LSTM) or r, z, n (GRU)."""

    input: Float32Array
    """[gates * hidden_size, features]."""
    recurrent: Float32Array
    """[gates * hidden_size, hidden_size]."""
    bias: Float32Array
    """[gates * hidden_size]. Of `gru` [4 * hidden_size]: r, z, n of the inputs, n of the state."""


@dataclass(frozen=True)
class NetworkWeights:
    """A stack of recurrent layers of one kind and size, and a linear readout of the last layer's state.

    Attributes:
        cell: The kind of every layer.
        scale: Mean and standard deviation of the inputs, [input_size] each; None if inputs are used as they are.
        layers: Layers, from the inputs up.
        readout: [output_size, hidden_size].
        readout_bias: [output_size].
    """

    cell: Cell
    scale: tuple[Float32Array, Float32Array] | None
    layers: tuple[LayerWeights, ...]
    readout: Float32Array
    readout_bias: Float32Array

    @property
    def state_tensors(self) -> int:
        """Tensors of the state: the hidden state, and the cell state of an LSTM."""
        return 2 if self.cell == "lstm" else 1
