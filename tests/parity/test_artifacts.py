"""Artifacts compared with eager PyTorch at random sizes, lengths, batches and cuts, in the runtimes themselves."""

import io
import warnings
from typing import Any

import numpy as np
import onnxruntime
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from support.eager import TOLERANCE
from support.models import random_network

from unroll_export import SimpleRNN
from unroll_export.graphs.onnx_rnn import build_onnx_rnn
from unroll_export.graphs.torchscript import build_torchscript

Array = NDArray[np.float32]
Outputs = tuple[Array, Array, Array]

SIZES = st.tuples(st.integers(1, 20), st.integers(1, 40), st.integers(1, 17), st.integers(1, 3))
SEEDS = st.integers(0, 2**32 - 1)


def session(model: bytes) -> Any:
    """Makes a session with one thread and onnxruntime's other defaults, for which bits are promised."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def run_onnx(model: Any, x: Array, state: Array) -> Outputs:
    logits, states, final = model.run(["logits", "states", "final_state"], {"input": x, "initial_state": state})
    return logits, states, final


def eager(network: SimpleRNN, x: Array, state: Array) -> Outputs:
    with torch.inference_mode():
        logits, states, final = network.unroll(torch.from_numpy(x), torch.from_numpy(state))
    return logits.numpy(), states.numpy(), final.numpy()


def draw(network: SimpleRNN, seed: int, batch: int, time: int, scale: float = 1.0) -> tuple[Array, Array]:
    """Draws input [batch, time, features] and initial state [layers, batch, hidden]."""
    rng = np.random.default_rng(seed)
    rnn = network.rnn
    x = scale * rng.standard_normal((batch, time, rnn.input_size), np.float32)
    state = rng.uniform(-1, 1, (rnn.num_layers, batch, rnn.hidden_size)).astype(np.float32)
    return x.astype(np.float32), state


def close(got: Outputs, expected: Outputs) -> None:
    for a, b in zip(got, expected, strict=True):
        assert a.shape == b.shape
        assert a.dtype == np.float32
        np.testing.assert_allclose(a, b, rtol=0, atol=TOLERANCE)


@settings(max_examples=40)
@given(SIZES, SEEDS, st.integers(1, 70), st.integers(1, 40))
def test_the_rnn_operator(sizes: tuple[int, int, int, int], seed: int, batch: int, time: int) -> None:
    network = random_network(*sizes, seed=seed)
    x, state = draw(network, seed, batch, time)
    close(run_onnx(session(build_onnx_rnn(network)), x, state), eager(network, x, state))


@settings(max_examples=15)
@given(SIZES, SEEDS, st.integers(1, 70), st.integers(1, 40))
def test_torchscript(sizes: tuple[int, int, int, int], seed: int, batch: int, time: int) -> None:
    network = random_network(*sizes, seed=seed)
    x, state = draw(network, seed, batch, time)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        module = torch.jit.load(io.BytesIO(build_torchscript(network)))  # type: ignore[no-untyped-call]
    with torch.inference_mode():
        outputs = module(torch.from_numpy(x), torch.from_numpy(state))
    close(tuple(output.numpy() for output in outputs), eager(network, x, state))
