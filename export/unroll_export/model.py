"""SimpleRNN: the recurrent classifier that everything here trains, exports and proves."""

import torch
from torch import Tensor, nn


class SimpleRNN(nn.Module):
    """An Elman network (Elman 1990) that classifies a sequence from its last timestep.

    h_t = tanh(W_xh (x_t - mean) / std + W_hh h_(t-1) + b), logits_t = W_hy h_t + b_y. The standardization is
    part of the model, so callers give raw features; untrained, it changes nothing (mean 0, std 1).

    Args:
        input_size: Features of one timestep.
        hidden_size: Width of the hidden state of one layer.
        output_size: Logits of one timestep: the number of classes, or 1 for a binary model.
        num_layers: Stacked recurrent layers.

    Attributes:
        mean: float32 [input_size], subtracted from every timestep.
        std: float32 [input_size], positive; divides every timestep.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, input_size: int, hidden_size: int, output_size: int, num_layers: int = 1) -> None:
        super().__init__()
        self.rnn = nn.RNN(input_size, hidden_size, num_layers=num_layers, batch_first=True)
        self.fc = nn.Linear(hidden_size, output_size)
        self.register_buffer("mean", torch.zeros(input_size))
        self.register_buffer("std", torch.ones(input_size))

    def unroll(self, x: Tensor, initial_state: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Runs every timestep and returns all that is computed on the way.

        Args:
            x: float32 [batch, time, input_size], raw features.
            initial_state: float32 [num_layers, batch, hidden_size]; zeros where absent.

        Returns:
            logits [batch, time, output_size], states of the last layer [batch, time, hidden_size], and the final
            state of every layer [num_layers, batch, hidden_size]; float32.
        """
        states, final_state = self.rnn((x - self.mean) / self.std, initial_state)
        return self.fc(states), states, final_state

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Classifies each sequence from the logits of its own last timestep.

        Args:
            x: float32 [batch, time, input_size], raw features; what follows a sequence's end is ignored, since a
                recurrent network is causal.
            lengths: int64 [batch], timesteps of each sequence, 1 to `time`; all of `time` where absent.

        Returns:
            Logits, float32 [batch, output_size].

        Raises:
            ValueError: a length is outside 1 to `time`, or there is not one a sequence.
        """
        batch, time = x.shape[:2]
        states, _ = self.rnn((x - self.mean) / self.std)
        if lengths is None:
            last = states[:, -1]
        elif lengths.shape != (batch,) or (batch and not 1 <= int(lengths.min()) <= int(lengths.max()) <= time):
            raise ValueError(f"lengths: {batch} values from 1 to {time} expected, got {lengths.tolist()}")
        else:
            last = states[torch.arange(batch, device=x.device), lengths.to(x.device) - 1]
        logits: Tensor = self.fc(last)
        return logits
