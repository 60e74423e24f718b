"""The TorchScript runtime: reused buffers do not affect results."""

import numpy as np
import pytest
import torch
from support.eager import TOLERANCE
from support.models import random_network

from unroll_engine.runtimes.base import on_host
from unroll_engine.runtimes.torchscript import TorchScriptRuntime, tanh_is_exact
from unroll_export.graphs.torchscript import build_torchscript

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
SHAPES = [(5, 3), (1, 1), (7, 9), (5, 3), (2, 4)]
"""Steps and lanes of consecutive runs, growing and shrinking."""


@pytest.mark.parametrize("device", DEVICES)
def test_results_stay_as_they_are_when_the_next_run_overwrites_the_buffers(device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    network = random_network(layers=2)
    runtime = TorchScriptRuntime(build_torchscript(network), device)
    rng = np.random.default_rng(0)
    runs = []
    for steps, lanes in SHAPES:
        x = rng.standard_normal((steps, lanes, 3), np.float32)
        state = rng.uniform(-1, 1, (2, lanes, 8)).astype(np.float32)
        # The arrays of a request are read-only.
        x.flags.writeable = state.flags.writeable = False
        runs.append((x, state, on_host(runtime.run(x, (state,)))))
    for x, state, result in runs:
        with torch.inference_mode():
            batch_major = torch.tensor(x.transpose(1, 0, 2))
            logits, states, final = network.unroll(batch_major, torch.tensor(state))
        assert np.abs(result.logits - logits.numpy().transpose(1, 0, 2)).max() <= TOLERANCE
        assert np.abs(result.states - states.numpy().transpose(1, 0, 2)).max() <= TOLERANCE
        assert np.abs(result.final_state[0] - final.numpy()).max() <= TOLERANCE


@pytest.mark.parametrize("gates", [1, 3, 4])
def test_pytorch_s_own_tanh_is_exact(gates: int) -> None:
    assert tanh_is_exact(gates, 5, 2, "cpu")
