"""PyTorch modules for tests of their export: stacks of recurrent layers, and what stands per step between them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

FEATURES, CLASSES = 4, 3


class BatchNorm(nn.Module):
    """Batch normalization of every step, by statistics of training."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width)
        self.norm.running_mean, self.norm.running_var = torch.randn(width), torch.rand(width) + 0.5

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        return y


class Stack(nn.Module):
    """Layers in a row; recurrent ones give their states on."""

    def __init__(self, layers: list[nn.Module], batch_first: bool = True, last: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.batch_first, self.last = batch_first, last

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)[0] if isinstance(layer, nn.RNNBase) else layer(x)
        return x.select(1 if self.batch_first else 0, -1) if self.last else x

    def on(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """Computes the outputs of one sequence, [time, classes], or [1, classes] if of the last step alone."""
        x = torch.from_numpy(values)
        with torch.no_grad():
            y: NDArray[np.float32] = self.eval()(x[None] if self.batch_first else x[:, None]).numpy()
        return y.reshape(-1, y.shape[-1])


PER_STEP: dict[str, Callable[[int], nn.Module]] = {
    "norm": nn.LayerNorm,
    "batchnorm": BatchNorm,
    "relu": lambda _: nn.ReLU(),
    "linear": lambda width: nn.Linear(width, width),
    "dropout": lambda _: nn.Dropout(0.5),
}


@dataclass(frozen=True)
class Recurrent:
    """A recurrent module."""

    kind: type[nn.RNN | nn.LSTM | nn.GRU]
    hidden: int
    layers: int = 1
    bias: bool = True
    projected: bool = False
    relu: bool = False

    def build(self, width: int, batch_first: bool) -> tuple[nn.Module, int]:
        """Builds it; returns it and the width of its outputs."""
        extra: dict[str, Any] = {"nonlinearity": "relu"} if self.relu and self.kind is nn.RNN else {}
        out = self.hidden
        if self.projected and self.kind is nn.LSTM and self.hidden > 1:
            extra["proj_size"] = out = self.hidden - 1
        drop = 0.3 if self.layers > 1 else 0.0
        options = {"bias": self.bias, "batch_first": batch_first, "dropout": drop, **extra}
        return self.kind(width, self.hidden, self.layers, **options), out


def stack(parts: Sequence[Recurrent | str], batch_first: bool = True, last: bool = False, seed: int = 0) -> Stack:
    """Builds a stack with a linear readout."""
    torch.manual_seed(seed)
    layers, width = [], FEATURES
    for part in parts:
        if isinstance(part, str):
            layers.append(PER_STEP[part](width))
        else:
            layer, width = part.build(width, batch_first)
            layers.append(layer)
    return Stack([*layers, nn.Linear(width, CLASSES)], batch_first, last)
