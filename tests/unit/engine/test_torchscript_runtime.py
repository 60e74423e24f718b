"""The TorchScript runtimes: reused buffers do not affect results."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from support.eager import TOLERANCE
from support.models import random_classifier

from unroll_engine.errors import RuntimeUnavailableError
from unroll_engine.runtimes.base import Runtime, on_host
from unroll_engine.runtimes.cudnn import tanh_is_exact
from unroll_engine.runtimes.torchscript import TorchScriptRuntime
from unroll_engine.runtimes.torchscript_cuda import TorchScriptCudaRuntime
from unroll_export.graphs.torchscript import build_torchscript
from unroll_export.model import Cell

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
SHAPES = [(5, 3), (1, 1), (7, 9), (5, 3), (2, 4)]
"""Steps and lanes of consecutive runs, growing and shrinking."""


@pytest.mark.parametrize("cell", ["rnn", "lstm", "gru"])
@pytest.mark.parametrize("device", DEVICES)
def test_results_stay_as_they_are_when_later_runs_reuse_the_memory(device: str, cell: Cell) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    network = random_classifier(cell, layers=2)
    runtime: Runtime = (TorchScriptRuntime if device == "cpu" else TorchScriptCudaRuntime)(build_torchscript(network))
    rng = np.random.default_rng(0)
    runs = []
    for steps, lanes in SHAPES:
        x = rng.standard_normal((steps, lanes, 3), np.float32)
        state = [rng.uniform(-1, 1, (2, lanes, 8)).astype(np.float32) for _ in range(1 + (cell == "lstm"))]
        # The arrays of a request are read-only.
        for array in (x, *state):
            array.flags.writeable = False
        runs.append((x, state, runtime.run(x, tuple(state))))
    for x, state, values in runs:
        result = on_host(values)
        given = [torch.tensor(array) for array in state]
        with torch.inference_mode():
            batch_major = torch.tensor(x.transpose(1, 0, 2))
            logits, states, final = network.unroll(batch_major, given[0] if len(given) == 1 else tuple(given))
        assert np.abs(result.logits - logits.numpy().transpose(1, 0, 2)).max() <= TOLERANCE
        assert np.abs(result.states - states.numpy().transpose(1, 0, 2)).max() <= TOLERANCE
        for got, expected in zip(result.final_state, final if len(given) > 1 else [final], strict=True):
            assert np.abs(got - expected.numpy()).max() <= TOLERANCE


def test_threads_share_no_memory() -> None:
    runtime = TorchScriptRuntime(build_torchscript(random_classifier("gru", layers=2)))
    rng = np.random.default_rng(0)
    inputs = [rng.standard_normal((64, 64, 3), np.float32) for _ in range(8)]
    state = (np.zeros((2, 64, 8), np.float32),)
    expected = [runtime.run(x, state).states.copy() for x in inputs]

    def differs(index: int) -> int:
        return sum(not np.array_equal(runtime.run(inputs[index], state).states, expected[index]) for _ in range(50))

    with ThreadPoolExecutor(len(inputs)) as threads:
        assert sum(threads.map(differs, range(len(inputs)))) == 0


def test_a_machine_without_a_card_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeUnavailableError, match="torch finds no CUDA device"):
        TorchScriptCudaRuntime(b"")


@pytest.mark.parametrize("gates", [1, 3, 4])
def test_pytorch_s_own_tanh_is_exact(gates: int) -> None:
    assert tanh_is_exact(gates, 5, 2, "cpu")
