"""The step kernel by itself: its rate against onnxruntime's operators, the Scan form and torch.mm.

`equal_lanes` and `threads` run in the worker process.
"""

import os
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import onnxruntime
import torch

from unroll_bench.contest.contestants import CLASSES, FEATURES, MODEL
from unroll_bench.contest.figures import Figure, Outcome, Verdict, ratios
from unroll_bench.contest.network import hold, random_network
from unroll_bench.contest.rows.row import Row
from unroll_bench.contest.session import Session
from unroll_engine import Engine
from unroll_engine.kernel import Network, read_onnx, unavailable_reason
from unroll_engine.models.spec import Float32Array
from unroll_engine.runtimes.onnx import OnnxCpuRuntime, session_options
from unroll_export import SimpleGRU, SimpleLSTM, SimpleRNN
from unroll_export.graphs.onnx_rnn import build_onnx_rnn

STEPS = 16
KERNEL, OPERATOR, SCAN, PRODUCT = "step kernel", "onnxruntime's operator", "Scan form", "torch.mm of the product"
ONE_THREAD, TWO_THREADS = "engine in process, one thread", "engine in process, two threads"
SEQUENCES, LENGTH = 1000, 29
ROUNDS = 15
SECONDS = 0.04
"""Approximate seconds of a contestant in a round."""
# Cell, features, hidden, lanes, steps, and the bars by contestant.
CASES: tuple[tuple[str, int, int, int, int, dict[str, float]], ...] = (
    ("RNN", 12, 128, 64, STEPS, {OPERATOR: 5, SCAN: 1.35}),
    ("RNN", 64, 512, 64, STEPS, {PRODUCT: 1.1}),
    ("RNN", 12, 128, 1, LENGTH, {OPERATOR: 2.5}),
    ("LSTM", 12, 128, 64, STEPS, {OPERATOR: 1.25}),
    ("GRU", 12, 128, 64, STEPS, {OPERATOR: 1.7}),
)
NETWORKS = {"RNN": SimpleRNN, "LSTM": SimpleLSTM, "GRU": SimpleGRU}


def equal_lanes(cell: str, features: int, hidden: int, lanes: int, steps: int) -> dict[str, list[float]]:
    """Measures seconds for the last logits of sequences of one length; the Scan form computes those of every step.

    Raises:
        WrongAnswerError: the kernel's logits differ from onnxruntime's.
    """
    torch.set_num_threads(1)
    network = random_network(partial(NETWORKS[cell], features, hidden, CLASSES))
    graph = build_onnx_rnn(network)
    x = np.random.default_rng(0).standard_normal((steps, lanes, features), dtype=np.float32)
    zeros = (np.zeros((1, lanes, hidden), np.float32),) * (2 if cell == "LSTM" else 1)
    kernel = Network(read_onnx(graph))

    def run() -> Float32Array:
        if lanes > 1:
            return kernel.run_to_end(x, zeros)[0]
        logits = np.empty((1, CLASSES), np.float32)
        kernel.run_one(x[:, 0], logits=logits[0])
        return logits

    session = onnxruntime.InferenceSession(graph, session_options(), providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]
    feeds = dict(zip(names, (np.ascontiguousarray(x.transpose(1, 0, 2)), *zeros), strict=True))

    def operator() -> Float32Array:
        every: Float32Array = session.run(["logits"], feeds)[0]
        return every[:, -1]

    rows = torch.randn(lanes, features + hidden)
    weight = torch.randn(features + hidden, len(network.rnn.weight_hh_l0))
    into = torch.empty(lanes, weight.shape[1])

    def product() -> None:
        with torch.inference_mode():
            for _ in range(steps):
                torch.mm(rows, weight, out=into)

    hold(f"{KERNEL}, {cell}", run(), operator())
    calls: dict[str, Callable[[], object]] = {KERNEL: run, OPERATOR: operator, PRODUCT: product}
    scan = OnnxCpuRuntime(graph)
    calls[SCAN] = lambda: scan.run(x, zeros)
    return _in_turns(calls)


def _in_turns(calls: Mapping[str, Callable[[], object]]) -> dict[str, list[float]]:
    """Measures seconds per call of each contestant, one figure per round."""
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


def threads(repository: Path) -> dict[str, list[float]]:
    """Measures seconds for sequences of one length through Engine on one thread and on two, hidden 128."""
    pinned = os.sched_getaffinity(0)
    # The process is pinned to one core; its threads may have one each.
    os.sched_setaffinity(0, range(os.cpu_count() or 1))
    try:
        engines = {
            name: Engine.load(repository / MODEL, threads=count) for name, count in ((ONE_THREAD, 1), (TWO_THREADS, 2))
        }
        sequences = list(np.random.default_rng(0).standard_normal((SEQUENCES, LENGTH, FEATURES), dtype=np.float32))
        seconds: dict[str, list[float]] = {name: [] for name in engines}
        for _ in range(2 * ROUNDS):
            for name, engine in engines.items():
                begin = time.perf_counter()
                engine.classify(sequences)
                seconds[name].append(time.perf_counter() - begin)
    finally:
        os.sched_setaffinity(0, pinned)
    return seconds


async def measure(session: Session, outcome: Outcome) -> None:
    """Measures contestants in turns in the worker process, case by case."""
    if reason := unavailable_reason():
        outcome.notes.append(reason)
        return
    for cell, features, hidden, lanes, steps, bars in CASES:
        taken = await session.inside(equal_lanes, cell, features, hidden, lanes, steps)
        where = f"{cell}, {features}/{hidden}/{lanes}, {steps} steps"
        for name, seconds in taken.items():
            outcome.figures.append(Figure(name, f"us, {where}", [second * 1e6 for second in seconds]))
        for name, bar in bars.items():
            outcome.verdicts.append(
                Verdict(f"{name}'s time / {KERNEL}'s, {where}", ratios(taken[name], taken[KERNEL]), bar)
            )
    taken = await session.inside(threads, await session.repository())
    for name, seconds in taken.items():
        outcome.figures.append(Figure(name, "ms for 1,000 x 29 steps", [second * 1e3 for second in seconds]))
    speedup = ratios(taken[ONE_THREAD], taken[TWO_THREADS])
    outcome.verdicts.append(Verdict("one thread's time / two threads'", speedup, 1.9))


ROW = Row("kernel", "step kernel alone, one core: RNN, LSTM, GRU, hidden 128 and 512", measure)
