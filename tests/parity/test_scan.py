"""The Scan form in ONNX Runtime: correct for every cell, and the same bits for a row in any batch and cut."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.recurrent import CELLS, random_sequences, recurrent_network

from unroll_engine.models.spec import Float32Array, State
from unroll_engine.runtimes.onnx import OnnxCpuRuntime

SIZES = st.tuples(st.integers(1, 20), st.integers(1, 40), st.integers(1, 17), st.integers(1, 3))
SEEDS = st.integers(0, 2**32 - 1)


def same_bits(got: Float32Array, expected: Float32Array) -> None:
    np.testing.assert_array_equal(
        np.ascontiguousarray(got).view(np.uint32), np.ascontiguousarray(expected).view(np.uint32)
    )


@settings(max_examples=60)
@given(st.sampled_from(CELLS), SIZES, SEEDS, st.integers(1, 70), st.integers(1, 20))
def test_it_computes_what_float64_does(
    cell: str, sizes: tuple[int, int, int, int], seed: int, lanes: int, steps: int
) -> None:
    network = recurrent_network(cell, *sizes, seed=seed)
    x, state = random_sequences(network, steps, lanes, seed)
    result = OnnxCpuRuntime(network.to_onnx()).run(x, state)
    logits, states = network.float64(x, state)
    np.testing.assert_allclose(result.logits, logits, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(result.states, states, rtol=1e-4, atol=1e-5)
    assert [array.shape for array in result.final_state] == [array.shape for array in state]
    same_bits(result.final_state[0][-1], result.states[-1])


@settings(max_examples=80)
@given(
    st.sampled_from(CELLS),
    SIZES,
    SEEDS,
    st.integers(1, 300),
    st.lists(st.integers(1, 9), min_size=1, max_size=6),
    st.sampled_from([1.0, 30.0, 1e4]),
    st.data(),
)
def test_a_row_has_the_same_bits_in_any_company_and_cut(
    cell: str,
    sizes: tuple[int, int, int, int],
    seed: int,
    lanes: int,
    chunks: list[int],
    scale: float,
    data: st.DataObject,
) -> None:
    network = recurrent_network(cell, *sizes, seed=seed)
    runtime = OnnxCpuRuntime(network.to_onnx())
    x, state = random_sequences(network, sum(chunks), lanes, seed)
    x *= np.float32(scale)
    whole = runtime.run(x, state)
    rows = data.draw(st.lists(st.integers(0, lanes - 1), min_size=1, max_size=80), label="rows, in any order, repeated")
    carried: State = tuple(array[:, rows] for array in state)
    logits, states = [], []
    for end, size in zip(np.cumsum(chunks), chunks, strict=True):
        part = runtime.run(x[end - size : end, rows], carried)
        logits.append(part.logits)
        states.append(part.states)
        carried = part.final_state
    same_bits(np.concatenate(logits), whole.logits[:, rows])
    same_bits(np.concatenate(states), whole.states[:, rows])
    for got, expected in zip(carried, whole.final_state, strict=True):
        same_bits(got, expected[:, rows])


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("sizes", [(12, 128, 9, 1), (1, 1, 1, 1), (3, 33, 2, 2), (64, 16, 1, 1)])
def test_the_bits_are_the_same_at_every_batch_size(cell: str, sizes: tuple[int, int, int, int]) -> None:
    network = recurrent_network(cell, *sizes)
    runtime = OnnxCpuRuntime(network.to_onnx())
    x, state = random_sequences(network, 2, 300)
    whole = runtime.run(x, state)
    for lanes in range(1, 301):
        first = 300 - lanes if lanes % 2 else 0
        rows = slice(first, first + lanes)
        part = runtime.run(x[:, rows].copy(), tuple(array[:, rows].copy() for array in state))
        same_bits(part.logits, whole.logits[:, rows])
        same_bits(part.states, whole.states[:, rows])
        for got, expected in zip(part.final_state, whole.final_state, strict=True):
            same_bits(got, expected[:, rows])


@pytest.mark.parametrize("cell", CELLS)
def test_a_neighbour_that_is_not_a_number_changes_nothing(cell: str) -> None:
    network = recurrent_network(cell, 12, 32, 4)
    runtime = OnnxCpuRuntime(network.to_onnx())
    x, state = random_sequences(network, 5, 7)
    whole = runtime.run(x, state)
    x[:, 3], x[:, 5] = np.nan, np.inf
    spoilt = runtime.run(x, state)
    kept = [0, 1, 2, 4, 6]
    same_bits(spoilt.logits[:, kept], whole.logits[:, kept])
    same_bits(spoilt.states[:, kept], whole.states[:, kept])
