"""The step kernel beside what else computes the same layers: onnxruntime's operators and Scan form, and torch.mm.

These run in the worker process.
"""

import os
import threading
import time
from collections.abc import Callable

import numpy as np
import onnxruntime
import torch
from support.eager import TOLERANCE
from support.recurrent import RecurrentNetwork, random_sequences, recurrent_network

from bench.asking import WrongAnswerError
from bench.inside.arithmetic import in_turns
from unroll_engine.kernel import Network, SequenceQueue, read_onnx
from unroll_engine.models.spec import Float32Array
from unroll_engine.runtimes.onnx import OnnxCpuRuntime, session_options
from unroll_export import SimpleRNN
from unroll_export.graphs.onnx_scan import build_onnx_scan

STEPS = 16
OUTPUTS = 9
KERNEL, OPERATOR, SCAN, PRODUCT = "step kernel", "onnxruntime's operator", "Scan form", "torch.mm of the product"
ONE_THREAD, TWO_THREADS = "step kernel, one thread", "step kernel, two threads"
SEQUENCES, LENGTH = 1000, 29
_GATES = {"lstm": 4, "gru": 3}


def equal_lanes(cell: str, features: int, hidden: int, lanes: int, steps: int) -> dict[str, list[float]]:
    """Seconds for sequences of one length, logits of their last steps; the Scan form gives those of every step."""
    torch.set_num_threads(1)
    network = recurrent_network(cell, features, hidden, OUTPUTS)
    x, state = random_sequences(network, steps, lanes)
    zeros = tuple(np.zeros_like(tensor) for tensor in state)
    kernel = Network(read_onnx(network.to_onnx()))

    def run() -> Float32Array:
        if lanes > 1:
            return kernel.run_to_end(x, zeros)[0]
        logits = np.empty((1, OUTPUTS), np.float32)
        kernel.run_one(x[:, 0], logits=logits[0])
        return logits

    session = onnxruntime.InferenceSession(network.to_onnx(), session_options(), providers=["CPUExecutionProvider"])
    feeds = {"input": np.ascontiguousarray(x.transpose(1, 0, 2))}
    feeds |= {f"initial_{name}": tensor for name, tensor in zip(("state", "cell"), zeros, strict=False)}

    def operator() -> Float32Array:
        every: Float32Array = session.run(["logits"], feeds)[0]
        return every[:, -1]

    rows = torch.randn(lanes, features + hidden)
    weight = torch.randn(features + hidden, hidden * _GATES.get(cell, 1))
    into = torch.empty(lanes, weight.shape[1])

    def product() -> None:
        with torch.inference_mode():
            for _ in range(steps):
                torch.mm(rows, weight, out=into)

    if not np.abs(run() - operator()).max() <= TOLERANCE:
        raise WrongAnswerError(f"{KERNEL}, {cell}: not what onnxruntime computes")
    calls: dict[str, Callable[[], object]] = {KERNEL: run, OPERATOR: operator, PRODUCT: product}
    if cell == "rnn_tanh":
        scan = OnnxCpuRuntime(build_onnx_scan(_simple_rnn(network)))
        calls[SCAN] = lambda: scan.run(x, zeros)
    return in_turns(calls)


def threads() -> dict[str, list[float]]:
    """Seconds for a queue of sequences on one thread and on two, hidden 128."""
    network = recurrent_network("rnn_tanh", 12, 128, OUTPUTS)
    x, _ = random_sequences(network, LENGTH, SEQUENCES)
    sequences = [np.ascontiguousarray(x[:, lane]) for lane in range(SEQUENCES)]
    logits = np.empty((SEQUENCES, OUTPUTS), np.float32)
    queue = SequenceQueue(Network(read_onnx(network.to_onnx())), threads=2)
    seconds: dict[str, list[float]] = {ONE_THREAD: [], TWO_THREADS: []}
    for _ in range(30):
        for name, count in ((ONE_THREAD, 1), (TWO_THREADS, 2)):
            for lane, sequence in enumerate(sequences):
                queue.submit(sequence, logits=logits[lane])
            workers = [threading.Thread(target=_advance, args=(queue, number)) for number in range(count)]
            begin = time.perf_counter()
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()
            seconds[name].append(time.perf_counter() - begin)
    return seconds


def _advance(queue: SequenceQueue, thread: int) -> None:
    # The process is pinned to one core; its threads may have one each.
    os.sched_setaffinity(0, {thread % (os.cpu_count() or 1)})
    queue.advance(2**40, thread)


def _simple_rnn(network: RecurrentNetwork) -> SimpleRNN:
    """The same weights as the exporter's model."""
    rnn = network.rnn
    model = SimpleRNN(rnn.input_size, rnn.hidden_size, network.fc.out_features, rnn.num_layers)
    model.rnn.load_state_dict(rnn.state_dict())
    model.fc.load_state_dict(network.fc.state_dict())
    model.mean.copy_(network.mean)
    model.std.copy_(network.std)
    return model.eval()
