"""Single steps that show one weight at a time, and weights recovered from answers to random steps."""

from collections.abc import Iterator
from itertools import product
from typing import Any, NamedTuple

import numpy as np

from unroll_engine.kernel.exact import UNIT, Float64Array
from unroll_export.graphs.tensors import state_names
from unroll_export.model import RecurrentClassifier
from unroll_export.parity.cases import MOST_GAIN
from unroll_export.parity.judging import Judged, worst_ratio
from unroll_export.parity.runners import Float32Array

PROBES = ("one feature at a time", "one unit at a time", "random states", "random steps")
"""Names of their cases."""
VALUES_AT_ONCE = 2**21
"""Most features of one call; bounds the memory for wide networks."""
GAINS = (1.0, 16.0)
"""Largest arguments of tanh from one feature, so that small weights show beside saturated ones."""
RESTING_CELL = 0.5
"""Cell state of an LSTM while one feature, or one unit, is probed."""
RANDOM_ROWS = 4096
SLACK = 2.0**-16
"""Apparent relative error of a weight that rounding can cause."""
DEVIATIONS = 8
"""Largest error of an estimated weight, in standard errors."""
CORRELATED = 16
"""Largest apparent error of a weight, as a multiple of that of eager PyTorch's weights."""


class Probe(NamedTuple):
    """Single steps that are run as one batch."""

    x: Float32Array
    """Raw features, [rows, features]."""
    state: Float32Array
    """See runners: hidden states, then cells of an LSTM."""
    identifies: bool = False
    """True if the rows are enough and varied enough for a WeightFinder."""


def probes(model: RecurrentClassifier[Any]) -> Iterator[tuple[str, Iterator[Probe]]]:
    """Returns the probes by the name of their case."""
    weights = {name: value.numpy() for name, value in model.state_dict().items()}
    layers, hidden = model.rnn.num_layers, model.rnn.hidden_size
    mean, std = weights["mean"], weights["std"]
    features = mean.size
    at_once = max(VALUES_AT_ONCE // max(features, hidden), 1)
    tensors = len(state_names(model))

    def resting(rows: int) -> Float32Array:
        # A forget gate shows only if there is something to forget.
        state = np.zeros((tensors * layers, rows, hidden), np.float32)
        state[layers:] = RESTING_CELL
        return state

    def by_feature() -> Iterator[Probe]:
        largest = np.abs(weights["rnn.weight_ih_l0"]).max(axis=0)
        gains = 1 / np.maximum(largest, 1 / MOST_GAIN)
        for gain, start in product(GAINS, range(0, features, at_once)):
            rows = np.arange(start, min(start + at_once, features))
            x = np.tile(mean, (len(rows), 1))
            x[np.arange(len(rows)), rows] += (std * gain * gains)[rows].astype(np.float32)
            yield Probe(x, resting(len(rows)))

    def by_unit() -> Iterator[Probe]:
        for layer in range(layers):
            for start in range(0, hidden, at_once):
                rows = np.arange(start, min(start + at_once, hidden))
                state = resting(len(rows))
                largest = np.abs(weights[f"rnn.weight_hh_l{layer}"]).max(axis=0)
                state[layer, np.arange(len(rows)), rows] = (1 / np.maximum(largest, 1 / MOST_GAIN))[rows]
                yield Probe(np.tile(mean, (len(rows), 1)), state)

    def at_random(spread: float) -> Iterator[Probe]:
        rng = np.random.default_rng(0)
        rows = max(RANDOM_ROWS, 8 * hidden)
        count = min(rows, max(at_once, 4 * hidden))
        for _ in range(0, rows, count):
            x = (mean + spread * std * rng.standard_normal((count, features), np.float32)).astype(np.float32)
            state = rng.uniform(-1, 1, (tensors * layers, count, hidden)).astype(np.float32)
            yield Probe(x, state, identifies=True)

    yield from zip(PROBES, (by_feature(), by_unit(), at_random(0), at_random(1)), strict=True)


class WeightFinder:
    """Finds errors of single weights by least squares, since rounding is hardly correlated with a product's inputs.

    Eager PyTorch shows how far it is. A term smaller than the unit in the last place of its sum may vanish.

    Args:
        inputs: Inputs of the product, [rows, inputs].
        weights: [outputs, inputs].
        sizes: Sums of the terms' absolute values, [rows, outputs].
        honest: Distance of eager PyTorch's sums from float64's, [rows, outputs].
    """

    def __init__(self, inputs: Float64Array, weights: Float32Array, sizes: Float64Array, honest: Float64Array) -> None:
        # The bias collects the mean of all roundings, and is not judged.
        self._inputs: Float64Array = np.hstack([inputs, np.ones((len(inputs), 1))])
        rows, terms = self._inputs.shape
        # Constant inputs can't be distinguished from the bias: a ridge keeps their estimates bounded.
        self._inverse = np.linalg.inv(self._inputs.T @ self._inputs + 1e-6 * rows * np.eye(terms))
        # For an error of norm 1.
        self._deviations = np.sqrt(np.abs(np.diag(self._inverse)) / rows)[:-1, None]
        tiny = float(np.finfo(np.float32).tiny)
        largest = np.maximum(np.abs(inputs).max(axis=0), tiny)[:, None]
        correlated = (np.abs(self._errors(honest)[0]) / self._deviations).max(axis=0)
        # One rounding of a sum is 2 UNIT sizes / sqrt(12) in the mean square, and at worst all of it seems a weight's.
        one = 2 * UNIT * np.sqrt((sizes**2).mean(axis=0))
        self._allowed = tiny + SLACK * np.abs(weights.T) + one / largest
        self._allowed += (0.3 * one * rows + CORRELATED * correlated) * self._deviations

    def judge(self, residuals: Float64Array) -> Judged:
        """Returns the largest ratio of a weight's apparent error to the allowed error, and the allowed error.

        Args:
            residuals: Distance of an artifact's sums from float64's, [rows, outputs].
        """
        errors, noise = self._errors(residuals)
        return worst_ratio(np.abs(errors), self._allowed + DEVIATIONS * noise * self._deviations)

    def _errors(self, residuals: Float64Array) -> tuple[Float64Array, Float64Array]:
        """Returns apparent errors of the weights, [inputs, outputs], and the norm of the residuals, [outputs]."""
        products = self._inputs.T @ residuals
        errors = self._inverse @ products
        left = (residuals**2).sum(axis=0) - (errors * products).sum(axis=0)
        return errors[:-1], np.sqrt(np.maximum(left, 0))
