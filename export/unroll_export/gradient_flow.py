"""Gradient flow: norm of the loss's gradient by distance from the end of a sequence."""

import copy
import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from unroll_export.metrics import loss_of
from unroll_export.model import RecurrentClassifier


@dataclass(frozen=True)
class GradientFlow:
    """The gradient flow of a model on a batch, as in Pascanu, Mikolov and Bengio (2013), section 2.

    Attributes:
        epoch: Epochs that the model had been trained for.
        log10_norms: Decimal logarithm of the mean |dL/ds_t| by distance from the end: the first is at a sequence's own
            last step, the next one step before it, and so on. s_t is the state after step t, of all layers
            together (h, and c of an LSTM); L is a sequence's own loss. None if the mean is 0.
        sequences: Number of sequences long enough for each distance; the mean is over these.
        spectral_radius: Largest absolute eigenvalue of W_hh for each layer: without gates, gradients can grow over long
            distances only if it is above 1. Empty if the cell has gates.
    """

    epoch: int
    log10_norms: list[float | None]
    sequences: list[int]
    spectral_radius: list[float]

    def as_json(self) -> dict[str, Any]:
        """Returns the record of `summary.json`."""
        return asdict(self)

    def decay(self, distance: int) -> float | None:
        """Returns the powers of ten by which the gradient has shrunk at a distance from the end; None if it is 0."""
        last, there = self.log10_norms[0], self.log10_norms[min(distance, len(self.log10_norms) - 1)]
        return None if last is None or there is None else last - there


def spectral_radii(model: RecurrentClassifier[Any]) -> list[float]:
    """Computes the largest absolute eigenvalue of each layer's recurrent weights; none if the cell has gates."""
    if not isinstance(model.rnn, nn.RNN):
        return []
    weights = (getattr(model.rnn, f"weight_hh_l{layer}") for layer in range(model.rnn.num_layers))
    return [float(torch.linalg.eigvals(weight.detach().double()).abs().max()) for weight in weights]


def log_gradient_norms(model: RecurrentClassifier[Any], x: Tensor, lengths: Tensor, labels: Tensor) -> Tensor:
    """Computes the natural logarithms of |dL/ds_t| for every step of every sequence.

    Backpropagation through time goes step by step in float64. After each step, every sequence's gradient is scaled to
    norm 1 and the logarithms of the scales are added, so that nothing underflows over any number of steps.

    Args:
        model: The model; unchanged.
        x: float32 [batch, time, features], raw features.
        lengths: int64 [batch].
        labels: int64 [batch].

    Returns:
        float64 [time, batch]; -inf after a sequence's end, and where the gradient is 0.
    """
    model = copy.deepcopy(model).double().eval().requires_grad_(False)
    inputs = model.standardize(x.double())
    batch, time = x.shape[:2]
    states = [_zeros(model, batch)]
    with torch.no_grad():
        for step in range(time):
            states.append(_step(model, inputs[:, step : step + 1], states[-1]))
    gradient = [torch.zeros_like(part) for part in states[-1]]
    scale = torch.zeros(batch, dtype=torch.float64)
    norms = torch.full((time, batch), -math.inf, dtype=torch.float64)
    for step in range(time - 1, -1, -1):
        ending = lengths - 1 == step
        if ending.any():
            top = states[step + 1][0][-1].clone().requires_grad_()
            loss = loss_of(model.fc(top), labels, reduction="none")[ending].sum()
            gradient[0][-1] += torch.autograd.grad(loss, top)[0]
        squares = torch.stack([part.square().sum((0, 2)) for part in gradient])
        norm = squares.sum(0).sqrt()
        scale = torch.where(norm > 0, scale + norm.log(), scale)
        norms[step] = torch.where(norm > 0, scale, -math.inf)
        divisor = torch.where(norm > 0, norm, 1.0)[:, None]
        gradient = [part / divisor for part in gradient]
        if step:
            before = [part.clone().requires_grad_() for part in states[step]]
            after = _step(model, inputs[:, step : step + 1], before)
            gradient = list(torch.autograd.grad(after, before, gradient))
    return norms


def measure(model: RecurrentClassifier[Any], batch: tuple[Tensor, Tensor, Tensor], epoch: int) -> GradientFlow:
    """Measures the model on a batch of x, lengths and labels."""
    x, lengths, labels = batch
    norms = log_gradient_norms(model, x, lengths, labels)
    distances = lengths - 1 - torch.arange(len(norms))[:, None]
    by_distance = [norms[distances == distance] for distance in range(int(lengths.max()))]
    means = [float(found.logsumexp(0)) - math.log(len(found)) for found in by_distance]
    return GradientFlow(
        epoch,
        log10_norms=[mean / math.log(10) if math.isfinite(mean) else None for mean in means],
        sequences=[len(found) for found in by_distance],
        spectral_radius=spectral_radii(model),
    )


def _zeros(model: RecurrentClassifier[Any], batch: int) -> list[Tensor]:
    rnn = model.rnn
    parts = 2 if isinstance(rnn, nn.LSTM) else 1
    return [torch.zeros(rnn.num_layers, batch, rnn.hidden_size, dtype=torch.float64) for _ in range(parts)]


def _step(model: RecurrentClassifier[Any], x: Tensor, state: list[Tensor]) -> list[Tensor]:
    """Runs one timestep, x [batch, 1, features]; a state is a list of tensors [layers, batch, hidden]."""
    if isinstance(model.rnn, nn.LSTM):
        _, (h, c) = model.rnn(x, (state[0], state[1]))
        return [h, c]
    return [model.rnn(x, state[0])[1]]
