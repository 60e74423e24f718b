"""Bidirectional classifiers, rebuilt from the weights of networks trained elsewhere."""

from typing import Literal, get_args

import torch
from torch import Tensor, nn

Readout = Literal["last", "final", "mean", "max"]
READOUTS: tuple[Readout, ...] = get_args(Readout)
"""What a readout can take of the states of both directions: their values at the last timestep, their final values (of
the backward direction that is at the first timestep), their mean or their maximum over time."""


class BidirectionalClassifier(nn.Module):
    """Recurrent layers of both directions with a linear readout, which classify whole sequences.

    Args:
        rnn: Layers of one direction, whose sizes and nonlinearity are used.
        output_size: Logits of a sequence.
        readout: Part of the states that the readout takes; see READOUTS.

    Attributes:
        rnn: The recurrent layers, batch first.
        fc: The readout.
        mean: float32 [input_size], subtracted from every timestep.
        std: float32 [input_size], positive; divides every timestep.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, rnn: nn.RNN | nn.LSTM | nn.GRU, output_size: int, readout: Readout) -> None:
        super().__init__()
        sizes = rnn.input_size, rnn.hidden_size, rnn.num_layers
        self.rnn: nn.RNN | nn.LSTM | nn.GRU
        if isinstance(rnn, nn.RNN):
            self.rnn = nn.RNN(*sizes, nonlinearity=rnn.nonlinearity, batch_first=True, bidirectional=True)
        else:
            self.rnn = type(rnn)(*sizes, batch_first=True, bidirectional=True)
        self.fc = nn.Linear(2 * rnn.hidden_size, output_size)
        self.register_buffer("mean", torch.zeros(rnn.input_size))
        self.register_buffer("std", torch.ones(rnn.input_size))
        self._readout = readout

    def forward(self, x: Tensor) -> Tensor:
        """Computes the logits of sequences, [batch, output_size], from raw features [batch, time, input_size]."""
        states, final = self.rnn((x - self.mean) / self.std)
        if self._readout == "last":
            taken = states[:, -1]
        elif self._readout == "final":
            hidden = final[0] if isinstance(final, tuple) else final
            taken = torch.cat([hidden[-2], hidden[-1]], 1)
        else:
            taken = states.mean(1) if self._readout == "mean" else states.amax(1)
        logits: Tensor = self.fc(taken)
        return logits
