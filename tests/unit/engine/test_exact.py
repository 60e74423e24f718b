"""The networks in float64: results of another reference, and bounds that only correct float32 meets."""

import numpy as np
import pytest
from support.recurrent import CELLS, random_sequences, recurrent_network

from unroll_engine.kernel import read_onnx
from unroll_engine.kernel.exact import ExactNetwork, Matrix, Near

SIZES = [(3, 20, 2), (12, 128, 1), (600, 8, 1)]


def exact_of(cell: str, sizes: tuple[int, int, int]) -> ExactNetwork:
    features, hidden, layers = sizes
    return ExactNetwork.of(read_onnx(recurrent_network(cell, features, hidden, 4, layers).to_onnx()))


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_a_step_is_what_another_reference_computes_and_float32_is_within_the_bound(
    cell: str, sizes: tuple[int, int, int]
) -> None:
    features, hidden, layers = sizes
    reference = recurrent_network(cell, features, hidden, 4, layers)
    x, state = random_sequences(reference, 1, 200)
    exact = exact_of(cell, sizes)
    step = exact.step(exact.inputs(x[0]), state)
    last = Near(step[0].value[-1], step[0].off[-1])
    expected = reference.float64(x, state)
    # The biases of an ONNX file are added in float32 when it is read.
    np.testing.assert_allclose(last.value, expected[1][0], rtol=0, atol=1e-6)
    np.testing.assert_allclose(exact.logits(last).value, expected[0][0], rtol=0, atol=1e-6)
    if cell != "gru_reset_before":
        logits, states = reference.eager(x, state)
        for got, near in ((states, last), (logits, exact.logits(last)), (logits, exact.logits(states[0]))):
            assert 0.001 < (np.abs(got[0] - near.value) / near.off).max() <= 1


@pytest.mark.parametrize("cell", CELLS)
def test_inputs_of_many_steps_are_those_of_each(cell: str) -> None:
    x, state = random_sequences(recurrent_network(cell, 600, 8, 4), 9, 300)
    exact = exact_of(cell, (600, 8, 1))
    whole = exact.inputs(x)
    for time in range(9):
        (one, *_), (other, *_) = (exact.step(inputs, state) for inputs in (whole.at(time), exact.inputs(x[time])))
        np.testing.assert_allclose(one.value, other.value, rtol=0, atol=1e-12)
        np.testing.assert_allclose(one.off, other.off, rtol=1e-5)


def test_a_sum_of_one_term_has_a_bound_of_a_few_roundings() -> None:
    matrix = Matrix(np.full((4, 4000), 0.3, np.float32), np.zeros(4, np.float32))
    alone, together = (matrix.sums(inputs).near() for inputs in (np.eye(4000), np.ones((1, 4000))))
    assert (alone.off / np.abs(alone.value)).max() < 10 * 2.0**-24
    assert 200 * 2.0**-24 < (together.off / np.abs(together.value)).max() < 270 * 2.0**-24


def test_a_large_matrix_is_multiplied_in_blocks() -> None:
    rng = np.random.default_rng(0)
    weight, bias = rng.standard_normal((5, 400_000), np.float32), rng.standard_normal(5, np.float32)
    inputs, off = rng.standard_normal((2, 400_000)), np.full((2, 400_000), 1e-7)
    sums = Matrix(weight, bias).sums(inputs, off)
    np.testing.assert_allclose(sums.value, inputs @ weight.T + bias, rtol=1e-9)
    np.testing.assert_allclose(sums.sizes, np.abs(inputs) @ np.abs(weight).T + np.abs(bias), rtol=1e-4)
    np.testing.assert_allclose(sums.passed, off @ np.abs(weight).T, rtol=1e-4)
    assert sums.terms.tolist() == [[400_001.0]] * 2


def test_small_terms_after_a_large_one_are_within_the_bound() -> None:
    """The worst case for the error of a sum: every addition rounds as much as the last one."""
    rows, terms = 20_000, 2000
    inputs = np.random.default_rng(0).uniform(-1e-5, 1e-5, (rows, terms)).astype(np.float32)
    inputs[:, 0] = np.random.default_rng(1).uniform(0.5, 1, rows)
    total = np.zeros(rows, np.float32)
    for term in inputs.T:
        total += term
    near = Matrix(np.ones((1, terms), np.float32), np.zeros(1, np.float32)).sums(inputs).near()
    assert 0.3 < (np.abs(total - near.value[:, 0]) / near.off[:, 0]).max() < 0.8
