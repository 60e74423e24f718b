"""Forecasts the next value of a series as it arrives, with a GRU trained in PyTorch."""

import tempfile

import numpy as np
import torch
from torch import nn

from unroll_engine import Engine
from unroll_export import export


class Forecaster(nn.Module):
    """Network that forecasts the next value of a series at every step, [batch, time, 1] to [batch, time, 1]."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrent = nn.GRU(1, 16, batch_first=True)
        self.readout = nn.Linear(16, 1)

    def forward(self, series: torch.Tensor) -> torch.Tensor:
        """Returns the forecasts for a batch of series."""
        states, _ = self.recurrent(series)
        forecast: torch.Tensor = self.readout(states)
        return forecast


def trained() -> Forecaster:
    """Returns a network trained on sines of many frequencies."""
    torch.manual_seed(0)
    network = Forecaster()
    optimizer = torch.optim.Adam(network.parameters(), 1e-2)
    for _ in range(150):
        frequency = torch.rand(32, 1) * 0.4 + 0.1
        series = torch.sin(torch.arange(41) * frequency + 6 * torch.rand(32, 1))[..., None]
        loss = nn.functional.mse_loss(network(series[:, :-1]), series[:, 1:])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return network.eval()


def main() -> None:
    """Trains a network, exports it with proof against itself, and forecasts in this process."""
    network = trained()
    with tempfile.TemporaryDirectory() as models:
        path = export(network, name="forecaster", example=torch.zeros(2, 5, 1), models=models)
        series = np.sin(np.arange(60) * 0.3).astype(np.float32)
        with Engine.load(path) as engine, torch.inference_mode():
            sequence = engine.open()
            forecasts = [sequence.advance([[value]]).logits[0, 0] for value in series]
            whole = network(torch.from_numpy(series)[None, :, None])[0, :, 0].numpy()
    error = np.abs(np.array(forecasts[20:-1]) - series[21:]).mean()
    print(f"mean error: {error:.3f}; largest difference from PyTorch: {np.abs(forecasts - whole).max():.1e}")


if __name__ == "__main__":
    main()
