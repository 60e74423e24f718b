"""The forms of one network side by side: Scan, RNN operator, TorchScript, eager PyTorch; and the bare product h W.

These run in the worker process.
"""

import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import torch
from support.eager import TOLERANCE
from support.models import random_network

from bench.asking import WrongAnswerError
from unroll_engine.runtimes.onnx import OnnxCpuRuntime, OnnxOperatorRuntime
from unroll_engine.runtimes.torchscript import TorchScriptRuntime
from unroll_export.graphs.onnx_rnn import build_onnx_rnn
from unroll_export.graphs.onnx_scan import build_onnx_scan
from unroll_export.graphs.torchscript import build_torchscript
from unroll_export.parity.runners import RuntimeRunner

STEPS = 16
ROUNDS = 15
SECONDS = 0.04
"""How long a contestant runs in a round, about."""
SCAN, OPERATOR, SCRIPT, EAGER, PRODUCT = "Scan", "RNN operator", "TorchScript", "eager PyTorch", "bare product h W"


class Shape(NamedTuple):
    """A network, and sequences side by side."""

    features: int
    hidden: int
    lanes: int

    def __str__(self) -> str:
        return "/".join(map(str, self))


SHAPES = (Shape(12, 128, 1), Shape(12, 128, 16), Shape(12, 128, 64), Shape(12, 128, 256), Shape(64, 512, 64))


def times(shape: Shape) -> dict[str, list[float]]:
    """Seconds that each contestant takes for `STEPS` timesteps, one figure a round, in turns."""
    torch.set_num_threads(1)
    return in_turns(_contestants(shape))


def in_turns(calls: Mapping[str, Callable[[], object]]) -> dict[str, list[float]]:
    """Seconds that a call of each contestant takes, one figure a round."""
    counts = {}
    for name, call in calls.items():
        begin = time.perf_counter()
        for _ in range(5):
            call()
        counts[name] = max(1, int(SECONDS / ((time.perf_counter() - begin) / 5)))
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            begin = time.perf_counter()
            for _ in range(counts[name]):
                call()
            taken[name].append((time.perf_counter() - begin) / counts[name])
    return taken


def _contestants(shape: Shape) -> dict[str, Callable[[], object]]:
    """One call each; all give the same, which is checked here."""
    network = random_network(shape.features, shape.hidden, outputs=9)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((shape.lanes, STEPS, shape.features), dtype=np.float32)
    state = rng.uniform(-1, 1, (1, shape.lanes, shape.hidden)).astype(np.float32)
    scan = OnnxCpuRuntime(build_onnx_scan(network))
    time_major = np.ascontiguousarray(x.transpose(1, 0, 2))
    operator = RuntimeRunner(OnnxOperatorRuntime(build_onnx_rnn(network)))
    script = RuntimeRunner(TorchScriptRuntime(build_torchscript(network), "cpu"))
    tensors = torch.from_numpy(x), torch.from_numpy(state)
    weight = torch.randn(shape.hidden, shape.hidden)
    rows = torch.randn(shape.lanes, shape.hidden)

    def eager() -> torch.Tensor:
        with torch.inference_mode():
            return network.unroll(*tensors)[0]

    def product() -> None:
        with torch.inference_mode():
            for _ in range(STEPS):
                torch.mm(rows, weight)

    expected = eager().numpy()
    answers = {
        SCAN: scan.run(time_major, (state,)).logits.transpose(1, 0, 2),
        OPERATOR: operator.run(x, state).logits,
        SCRIPT: script.run(x, state).logits,
    }
    for name, logits in answers.items():
        if not np.abs(logits - expected).max() <= TOLERANCE:
            raise WrongAnswerError(f"{name}: not what eager PyTorch computes")
    return {
        SCAN: lambda: scan.run(time_major, (state,)),
        OPERATOR: lambda: operator.run(x, state),
        SCRIPT: lambda: script.run(x, state),
        EAGER: eager,
        PRODUCT: product,
    }
