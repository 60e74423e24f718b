"""Every artifact against eager PyTorch at random sizes, lengths, batches and cuts, in the runtimes themselves."""

import io
import warnings
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from support.eager import TOLERANCE
from support.models import random_network

from unroll_export import SimpleRNN
from unroll_export.graphs.onnx_rnn import build_onnx_rnn
from unroll_export.graphs.onnx_scan import build_onnx_scan
from unroll_export.graphs.torchscript import build_torchscript

Array = NDArray[np.float32]
Outputs = tuple[Array, Array, Array]

SIZES = st.tuples(st.integers(1, 20), st.integers(1, 40), st.integers(1, 17), st.integers(1, 3))
SEEDS = st.integers(0, 2**32 - 1)


def session(model: bytes) -> Any:
    """One thread, everything else as onnxruntime has it: what docs/numerics.md promises the bits for."""
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
    """Input [batch, time, features] and initial state [layers, batch, hidden]."""
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


def same_bits(got: Array, expected: Array) -> None:
    np.testing.assert_array_equal(
        np.ascontiguousarray(got).view(np.uint32), np.ascontiguousarray(expected).view(np.uint32)
    )


@settings(max_examples=40, deadline=None)
@given(SIZES, SEEDS, st.integers(1, 70), st.integers(1, 40))
def test_the_rnn_operator(sizes: tuple[int, int, int, int], seed: int, batch: int, time: int) -> None:
    network = random_network(*sizes, seed=seed)
    x, state = draw(network, seed, batch, time)
    close(run_onnx(session(build_onnx_rnn(network)), x, state), eager(network, x, state))


@settings(max_examples=40, deadline=None)
@given(SIZES, SEEDS, st.integers(1, 70), st.integers(1, 40))
def test_scan(sizes: tuple[int, int, int, int], seed: int, batch: int, time: int) -> None:
    network = random_network(*sizes, seed=seed)
    x, state = draw(network, seed, batch, time)
    logits, states, final = run_onnx(session(build_onnx_scan(network)), x.swapaxes(0, 1).copy(), state)
    close((logits.swapaxes(0, 1), states.swapaxes(0, 1), final), eager(network, x, state))


@settings(max_examples=15, deadline=None)
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


@settings(max_examples=60, deadline=None)
@given(
    SIZES,
    SEEDS,
    st.integers(1, 300),
    st.lists(st.integers(1, 9), min_size=1, max_size=6),
    st.sampled_from([1.0, 30.0, 1e4]),
    st.data(),
)
def test_scan_gives_a_row_the_same_bits_in_any_company_and_cut(
    sizes: tuple[int, int, int, int], seed: int, batch: int, chunks: list[int], scale: float, data: st.DataObject
) -> None:
    network = random_network(*sizes, seed=seed)
    model = session(build_onnx_scan(network))
    x, state = draw(network, seed, batch, sum(chunks), scale)
    x = x.swapaxes(0, 1).copy()
    whole = run_onnx(model, x, state)
    rows = data.draw(st.lists(st.integers(0, batch - 1), min_size=1, max_size=80), label="rows, in any order, repeated")
    carried, parts = state[:, rows], []
    for end, size in zip(np.cumsum(chunks), chunks, strict=True):
        parts.append(run_onnx(model, x[end - size : end, rows], carried))
        carried = parts[-1][2]
    for index in (0, 1):
        same_bits(np.concatenate([part[index] for part in parts]), whole[index][:, rows])
    same_bits(carried, whole[2][:, rows])


@pytest.mark.parametrize("sizes", [(12, 128, 9, 1), (1, 1, 1, 1), (3, 33, 2, 2), (64, 16, 1, 1), (12, 512, 16, 1)])
def test_scan_gives_the_same_bits_at_every_batch_size(sizes: tuple[int, int, int, int]) -> None:
    network = random_network(*sizes)
    model = session(build_onnx_scan(network))
    x, state = draw(network, 0, 300, 2)
    x = x.swapaxes(0, 1).copy()
    whole = run_onnx(model, x, state)
    for batch in range(1, 301):
        first = 300 - batch if batch % 2 else 0
        rows = slice(first, first + batch)
        part = run_onnx(model, x[:, rows].copy(), state[:, rows].copy())
        for got, expected in zip(part, whole, strict=True):
            same_bits(got, expected[:, rows])


def test_a_neighbour_that_is_not_a_number_changes_nothing() -> None:
    network = random_network(12, 32, 4)
    model = session(build_onnx_scan(network))
    x, state = draw(network, 0, 7, 5)
    x = x.swapaxes(0, 1).copy()
    whole = run_onnx(model, x, state)
    x[:, 3] = np.nan
    x[:, 5] = np.inf
    kept = [0, 1, 2, 4, 6]
    for got, expected in zip(run_onnx(model, x, state), whole, strict=True):
        same_bits(got[:, kept], expected[:, kept])
