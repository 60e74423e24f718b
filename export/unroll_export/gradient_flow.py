"""What vanishing and exploding gradients do: how much of the loss's gradient arrives how far from a sequence's end."""

import copy
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from unroll_export.metrics import loss_of
from unroll_export.model import SimpleRNN


@dataclass(frozen=True)
class GradientFlow:
    """The gradient flow of a model on a batch, as in Pascanu, Mikolov and Bengio (2013), section 2.

    Attributes:
        epoch: Epochs that the model had been trained for.
        norms: Mean of |dL/dh_t| by distance from the end: the first is at a sequence's own last step, the next one
            step before it, and so on. h_t is the state that step t hands on, of all layers together; L is a
            sequence's own loss.
        sequences: How many sequences are long enough for each distance: those that its mean is over.
        spectral_radius: Largest absolute eigenvalue of W_hh, one a layer: gradients can grow over long
            distances only where it is above 1.
    """

    epoch: int
    norms: list[float]
    sequences: list[int]
    spectral_radius: list[float]

    def as_json(self) -> dict[str, Any]:
        """The record as it stands in `summary.json`."""
        return asdict(self)


def spectral_radii(model: SimpleRNN) -> list[float]:
    """Largest absolute eigenvalue of the recurrent weights of each layer."""
    weights = (getattr(model.rnn, f"weight_hh_l{layer}") for layer in range(model.rnn.num_layers))
    return [float(torch.linalg.eigvals(weight.detach().double()).abs().max()) for weight in weights]


def gradient_norms(model: SimpleRNN, x: Tensor, lengths: Tensor, labels: Tensor) -> Tensor:
    """Norms of dL/dh_t for every step of every sequence.

    The network is run one step a call, so that every h_t is a tensor of its own that autograd can give the
    gradient of; in float64, in which a gradient of 1e-300 is still not 0.

    Args:
        model: Left as it is.
        x: float32 [batch, time, features], raw features.
        lengths: int64 [batch].
        labels: int64 [batch].

    Returns:
        float64 [time, batch]; 0 after a sequence's end.
    """
    model = copy.deepcopy(model).double()
    inputs = (x.double() - model.mean) / model.std
    batch, time = x.shape[:2]
    state = torch.zeros(model.rnn.num_layers, batch, model.rnn.hidden_size, dtype=torch.float64)
    states: list[Tensor] = []
    for step in range(time):
        _, state = model.rnn(inputs[:, step : step + 1], state)
        states.append(state)
    ends = torch.stack([state[-1] for state in states], 1)[torch.arange(batch), lengths - 1]
    # The sum keeps sequences apart: each state's gradient is that of its own sequence's loss.
    gradients = torch.autograd.grad(loss_of(model.fc(ends), labels, reduction="sum"), states)
    norms: Tensor = torch.linalg.vector_norm(torch.stack(gradients), dim=(1, 3))
    return norms


def measure(model: SimpleRNN, batch: tuple[Tensor, Tensor, Tensor], epoch: int) -> GradientFlow:
    """Measures the model on a batch of x, lengths and labels."""
    x, lengths, labels = batch
    norms = gradient_norms(model, x, lengths, labels)
    distances = lengths - 1 - torch.arange(len(norms))[:, None]
    by_distance = [norms[distances == distance] for distance in range(int(lengths.max()))]
    return GradientFlow(
        epoch,
        norms=[float(found.mean()) for found in by_distance],
        sequences=[len(found) for found in by_distance],
        spectral_radius=spectral_radii(model),
    )
