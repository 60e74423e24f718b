"""`make bench`: the forms of one network side by side, in one run: Scan, RNN operator, TorchScript, eager PyTorch.

Contestants take turns, so that what else the machine does hits all alike; figures are ratios of medians, with the
spread of the repeats. Absolute times mean little on a shared machine.
"""

import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from support.models import random_network

from unroll_export.graphs.onnx_rnn import build_onnx_rnn
from unroll_export.graphs.onnx_scan import build_onnx_scan
from unroll_export.graphs.torchscript import build_torchscript
from unroll_export.parity.runners import open_runner
from unroll_proto.v1 import bundle_pb2 as pb
from unroll_server.runtimes.onnx import OnnxCpuRuntime

STEPS = 16
SHAPES = [(12, 128, 1), (12, 128, 16), (12, 128, 64), (12, 128, 256), (64, 512, 64)]
ROUNDS = 21
SECONDS = 0.05
"""How long a contestant runs in a round, about."""


def contestants(features: int, hidden: int, lanes: int) -> dict[str, Callable[[], object]]:
    """One call each: `STEPS` timesteps of `lanes` sequences; all give the same, which is checked before timing."""
    network = random_network(features, hidden, outputs=9)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((lanes, STEPS, features), dtype=np.float32)
    state = rng.uniform(-1, 1, (1, lanes, hidden)).astype(np.float32)
    scan = OnnxCpuRuntime(build_onnx_scan(network))
    time_major = np.ascontiguousarray(x.transpose(1, 0, 2))
    operator = open_runner(pb.ARTIFACT_KIND_ONNX_RNN, build_onnx_rnn(network))
    script = open_runner(pb.ARTIFACT_KIND_TORCHSCRIPT, build_torchscript(network))
    tensors = torch.from_numpy(x), torch.from_numpy(state)
    weight = torch.randn(hidden, hidden)
    rows = torch.randn(lanes, hidden)

    def eager() -> torch.Tensor:
        with torch.inference_mode():
            return network.unroll(*tensors)[0]

    def product() -> None:
        with torch.inference_mode():
            for _ in range(STEPS):
                torch.mm(rows, weight)

    expected = eager().numpy()
    assert np.abs(scan.run(time_major, (state,)).logits.transpose(1, 0, 2) - expected).max() <= 1e-5
    for runner in (operator, script):
        assert np.abs(runner.run(x, state).logits - expected).max() <= 1e-5
    return {
        "Scan": lambda: scan.run(time_major, (state,)),
        "RNN operator": lambda: operator.run(x, state),
        "TorchScript": lambda: script.run(x, state),
        "eager PyTorch": eager,
        "product h W": product,
    }


def measure(calls: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
    """Seconds a call of every contestant, one figure a round, in turns."""
    counts = {}
    for name, call in calls.items():
        begin = time.perf_counter()
        for _ in range(5):
            call()
        counts[name] = max(1, int(SECONDS / ((time.perf_counter() - begin) / 5)))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            begin = time.perf_counter()
            for _ in range(counts[name]):
                call()
            times[name].append((time.perf_counter() - begin) / counts[name])
    return times


def main() -> None:
    """Prints one table: how many times as long as Scan each contestant takes."""
    torch.set_num_threads(1)
    table = Table(
        "in/hidden/lanes", *contestants(1, 1, 1), title=f"{STEPS} steps: time, in times of Scan's (quartiles)"
    )
    for shape in SHAPES:
        times = measure(contestants(*shape))
        scan = statistics.median(times["Scan"])
        cells = [f"{scan * 1e6:.0f} us"]
        for name in list(times)[1:]:
            low, middle, high = (quartile / scan for quartile in statistics.quantiles(times[name], n=4))
            cells.append(f"{middle:.2f} ({low:.2f} to {high:.2f})")
        table.add_row("/".join(map(str, shape)), *cells)
    Console(width=130).print(table)


if __name__ == "__main__":
    main()
