"""The network in float64, and the distance from it that float32 arithmetic allows at each value of a step.

With u = 2^-24, a float32 sum of m terms t_k, added in any order, is off by at most (m - 1) u sum |t_k| (Higham,
Accuracy and Stability of Numerical Algorithms, section 4.2). With independent roundings it is off by more than
2 sqrt(m) u sum |t_k| less than once in 1,000 times, whatever the order (Higham and Mary, A New Approach to
Probabilistic Rounding Error Analysis, 2019). `summed` takes the smaller one; terms that are zero do not count.
docs/numerics.md has the derivation.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from unroll_export.model import SimpleRNN
from unroll_export.parity.runners import Float32Array

Float64Array = NDArray[np.float64]

UNIT = 2.0**-24
"""Unit roundoff of float32."""
TANH_ULPS, TANH_UNITS = 8, 4
"""Largest error of a runtime's tanh: units in the last place, and unit roundoffs beside them. onnxruntime's RNN
operator is 1.6 unit roundoffs off near 0."""
EXTRA = 6
"""Roundings of a term beside the sum: subtraction, division and product, and the additions of biases."""
SMALLEST = float(np.finfo(np.float32).tiny)


class Step(NamedTuple):
    """One timestep in float64, with the bound of each value."""

    states: Float64Array
    """[layers, rows, hidden]."""
    logits: Float64Array
    """[rows, output_size]."""
    state_bounds: Float64Array
    """Largest honest distance of a float32 state, [layers, rows, hidden]."""
    logit_bounds: Float64Array
    """Likewise of the logits, [rows, output_size]."""


def summed(terms: Float64Array, sizes: Float64Array) -> Float64Array:
    """Bound of a float32 sum.

    Args:
        terms: Number of terms that are not zero.
        sizes: Sum of the terms' absolute values.
    """
    bound: Float64Array = (np.minimum(terms, 2 * np.sqrt(terms)) + EXTRA) * UNIT * sizes + SMALLEST
    return bound


class ExactNetwork:
    """A SimpleRNN whose steps are computed in float64 from its float32 weights."""

    def __init__(self, model: SimpleRNN) -> None:
        weights = {name: value.numpy().astype(np.float64) for name, value in model.state_dict().items()}
        self._mean, self._std = weights["mean"], weights["std"]
        self._layers = [
            tuple(weights[f"rnn.{name}_l{layer}"].T for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
            for layer in range(model.rnn.num_layers)
        ]
        self._readout, self._bias = weights["fc.weight"].T, weights["fc.bias"]

    def step(self, x: Float32Array, state: Float32Array | Float64Array) -> Step:
        """Computes one timestep.

        Args:
            x: Raw features, [rows, features].
            state: State before it, [layers, rows, hidden].
        """
        values, error = (x.astype(np.float64) - self._mean) / self._std, np.zeros(1)
        states: list[Float64Array] = []
        bounds: list[Float64Array] = []
        for before, (of_input, of_state, bias_input, bias_state) in zip(state, self._layers, strict=True):
            before = before.astype(np.float64)
            total = values @ of_input + before @ of_state + bias_input + bias_state
            sizes = np.abs(values) @ np.abs(of_input) + np.abs(before) @ np.abs(of_state)
            sizes += np.abs(bias_input) + np.abs(bias_state)
            terms = np.count_nonzero(values, axis=1) + np.count_nonzero(before, axis=1) + 2
            off = summed(terms[:, None].astype(np.float64), sizes)
            if states:
                off += error @ np.abs(of_input)
            values = np.tanh(total)
            # The steepest tanh within the distance.
            slope = 1 - np.tanh(np.maximum(np.abs(total) - off, 0)) ** 2
            error = slope * off + (TANH_ULPS * 2 * np.abs(values) + TANH_UNITS) * UNIT
            states.append(values)
            bounds.append(error)
        logits = values @ self._readout + self._bias
        logit_bounds = self.readout_bounds(values) + error @ np.abs(self._readout)
        return Step(np.stack(states), logits, np.stack(bounds), logit_bounds)

    def readout(self, states: Float32Array) -> Float64Array:
        """Logits of states of the last layer, [rows, hidden] -> [rows, output_size]."""
        logits: Float64Array = states.astype(np.float64) @ self._readout + self._bias
        return logits

    def readout_bounds(self, states: Float32Array | Float64Array) -> Float64Array:
        """Bounds of logits that are computed from exactly these states."""
        sizes = np.abs(states.astype(np.float64)) @ np.abs(self._readout) + np.abs(self._bias)
        return summed(np.count_nonzero(states, axis=1)[:, None] + 1.0, sizes)

    @property
    def readout_weights(self) -> Float64Array:
        """Weights and bias of the readout, [hidden + 1, output_size]."""
        return np.vstack([self._readout, self._bias])

    def inner_weights(self, layer: int) -> Float64Array:
        """Weights of a layer's previous state, then those of the layer below it if there is one, and the bias.

        Returns:
            [hidden + 1, hidden] for the first layer, else [2 hidden + 1, hidden].
        """
        of_input, of_state, bias_input, bias_state = self._layers[layer]
        return np.vstack([of_state, *([of_input] if layer else []), bias_input + bias_state])
