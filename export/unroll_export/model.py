"""SimpleRNN, SimpleLSTM, SimpleGRU: the recurrent classifiers that `unroll-train` trains."""

from typing import Any, ClassVar, Generic, Literal, TypeVar

import torch
from torch import Tensor, nn

Cell = Literal["rnn", "lstm", "gru"]
Nonlinearity = Literal["tanh", "relu"]
State = TypeVar("State")
"""Recurrent state of torch's modules: h, or (h, c) of an LSTM; [num_layers, batch, hidden_size] each."""


class RecurrentClassifier(nn.Module, Generic[State]):
    """A stack of recurrent layers with a linear readout, which classifies a sequence from its last timestep.

    The standardization (x_t - mean) / std is part of the model, so callers pass raw features. It is the identity at
    first (mean 0, std 1).

    Args:
        rnn: The recurrent layers, batch first.
        output_size: Logits of one timestep: the number of classes, or 1 for a binary model.

    Attributes:
        architecture: Name of the class in manifests and summaries.
        rnn: The recurrent layers.
        fc: The readout.
        mean: float32 [input_size], subtracted from every timestep.
        std: float32 [input_size], positive; divides every timestep.
    """

    architecture: ClassVar[str]
    mean: Tensor
    std: Tensor

    def __init__(self, rnn: nn.RNN | nn.LSTM | nn.GRU, output_size: int) -> None:
        super().__init__()
        self.rnn = rnn
        self.fc = nn.Linear(rnn.hidden_size, output_size)
        self.register_buffer("mean", torch.zeros(rnn.input_size))
        self.register_buffer("std", torch.ones(rnn.input_size))

    def standardize(self, x: Tensor) -> Tensor:
        """Standardizes raw features [..., input_size]."""
        return (x - self.mean) / self.std

    def unroll(self, x: Tensor, initial_state: State | None = None) -> tuple[Tensor, Tensor, State]:
        """Runs every timestep.

        Args:
            x: float32 [batch, time, input_size], raw features.
            initial_state: State of every layer before the first timestep; None for zeros.

        Returns:
            logits float32 [batch, time, output_size], hidden states of the last layer float32
            [batch, time, hidden_size], and the final state of every layer.
        """
        states, final_state = self.rnn(self.standardize(x), initial_state)
        return self.fc(states), states, final_state

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Classifies each sequence from the logits of its own last timestep.

        Args:
            x: float32 [batch, time, input_size], raw features. Timesteps after a sequence's end have no influence,
                since the network is causal.
            lengths: int64 [batch], timesteps of each sequence, 1 to `time`; None for `time`.

        Returns:
            Logits, float32 [batch, output_size].

        Raises:
            ValueError: a length is outside 1 to `time`, or their number is not `batch`.
        """
        batch, time = x.shape[:2]
        states, _ = self.rnn(self.standardize(x))
        if lengths is None:
            last = states[:, -1]
        elif lengths.shape != (batch,) or (batch and not 1 <= int(lengths.min()) <= int(lengths.max()) <= time):
            raise ValueError(f"lengths: {batch} values from 1 to {time} expected, got {lengths.tolist()}")
        else:
            last = states[torch.arange(batch, device=x.device), lengths.to(x.device) - 1]
        logits: Tensor = self.fc(last)
        return logits


class SimpleRNN(RecurrentClassifier[Tensor]):
    """An Elman network (Elman 1990): h_t = f(W_xh x_t + W_hh h_(t-1) + b), logits_t = W_hy h_t + b_y.

    Args:
        input_size: Features of one timestep.
        hidden_size: Width of the hidden state of one layer.
        output_size: Logits of one timestep: the number of classes, or 1 for a binary model.
        num_layers: Stacked recurrent layers.
        dropout: Probability of zeroing an input of a layer above the first, in training only.
        nonlinearity: f, "tanh" or "relu".
    """

    architecture = "simple_rnn"

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        output_size: int,
        num_layers: int = 1,
        dropout: float = 0.0,
        nonlinearity: Nonlinearity = "tanh",
    ) -> None:
        rnn = nn.RNN(input_size, hidden_size, num_layers, nonlinearity=nonlinearity, dropout=dropout, batch_first=True)
        super().__init__(rnn, output_size)


class SimpleLSTM(RecurrentClassifier[tuple[Tensor, Tensor]]):
    """Long short-term memory (Hochreiter and Schmidhuber 1997; forget gate: Gers et al. 2000), as torch.nn.LSTM.

    Args:
        input_size: See SimpleRNN.
        hidden_size: See SimpleRNN.
        output_size: See SimpleRNN.
        num_layers: See SimpleRNN.
        dropout: See SimpleRNN.
    """

    architecture = "simple_lstm"

    def __init__(
        self, input_size: int, hidden_size: int, output_size: int, num_layers: int = 1, dropout: float = 0.0
    ) -> None:
        super().__init__(nn.LSTM(input_size, hidden_size, num_layers, dropout=dropout, batch_first=True), output_size)


class SimpleGRU(RecurrentClassifier[Tensor]):
    """Gated recurrent units (Cho et al. 2014) with the reset gate applied after the product, as torch.nn.GRU.

    Args:
        input_size: See SimpleRNN.
        hidden_size: See SimpleRNN.
        output_size: See SimpleRNN.
        num_layers: See SimpleRNN.
        dropout: See SimpleRNN.
    """

    architecture = "simple_gru"

    def __init__(
        self, input_size: int, hidden_size: int, output_size: int, num_layers: int = 1, dropout: float = 0.0
    ) -> None:
        super().__init__(nn.GRU(input_size, hidden_size, num_layers, dropout=dropout, batch_first=True), output_size)


def build(
    cell: Cell,
    input_size: int,
    hidden_size: int,
    output_size: int,
    num_layers: int = 1,
    dropout: float = 0.0,
    nonlinearity: Nonlinearity = "tanh",
) -> RecurrentClassifier[Any]:
    """Builds the classifier of a cell; see SimpleRNN for the arguments. Only the "rnn" cell uses `nonlinearity`."""
    sizes = (input_size, hidden_size, output_size, num_layers, dropout)
    if cell == "rnn":
        return SimpleRNN(*sizes, nonlinearity)
    return SimpleLSTM(*sizes) if cell == "lstm" else SimpleGRU(*sizes)


@torch.no_grad()
def initialize_memory(model: RecurrentClassifier[Any], steps: int) -> None:
    """Draws the biases of the gates that keep the state so that units forget over 1 to `steps` timesteps.

    Chrono initialization (Tallec and Ollivier 2018): the forget gate's bias of an LSTM is log(U(1, steps - 1)), the
    input gate's is its negative; the update gate's of a GRU is log(U(1, steps - 1)). An Elman network stays as it is.

    Args:
        model: A new model; draws from torch's global generator.
        steps: Timesteps of the longest dependency, 3 or more to have an effect.
    """
    rnn, size = model.rnn, model.rnn.hidden_size
    for layer in range(rnn.num_layers if steps > 2 and not isinstance(rnn, nn.RNN) else 0):
        bias = getattr(rnn, f"bias_ih_l{layer}")
        getattr(rnn, f"bias_hh_l{layer}")[: 2 * size].zero_()
        keep = torch.empty(size).uniform_(1, steps - 1).log()
        # torch's order of gates: input, forget, cell, output; reset, update, new.
        bias[size : 2 * size] = keep
        if isinstance(rnn, nn.LSTM):
            bias[:size] = -keep


CELLS: dict[str, Cell] = {SimpleRNN.architecture: "rnn", SimpleLSTM.architecture: "lstm", SimpleGRU.architecture: "gru"}
"""The cell of each architecture."""
