"""Recurrent networks in float64, and the distance from it that float32 arithmetic allows at each value of a step.

With u = 2^-24, a float32 sum of m terms t_k, added in any order, is off by at most (m - 1) u sum |t_k| (Higham,
Accuracy and Stability of Numerical Algorithms, section 4.2). With independent roundings it is off by more than
4 sqrt(m) u sum |t_k| less than once in 1,000 times, whatever the order and their distribution (Higham and Mary, A New
Approach to Probabilistic Rounding Error Analysis, 2019), and less than once in 10^10 if they are spread evenly.
`Sums.near` takes the smaller bound; terms that are zero do not count. From there each operation passes the error of its
operands on and adds its own. docs/numerics.md has the derivation.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from unroll_engine.kernel.weights import Cell, NetworkWeights
from unroll_engine.models.spec import Float32Array

Float64Array = NDArray[np.float64]
Array = Float32Array | Float64Array

UNIT = 2.0**-24
"""Unit roundoff of float32."""
ULPS, UNITS = 8, 4
"""Largest error of a runtime's tanh or sigmoid: units in the last place, and unit roundoffs beside them. onnxruntime's
RNN operator is 1.6 unit roundoffs off near 0."""
EXTRA = 6
"""Roundings of a term beside the sum: subtraction, division and product, and the additions of biases."""
_SMALLEST = float(np.finfo(np.float32).tiny)
_BLOCK = 2**20
"""Values in float64 that are multiplied at once; bounds the memory of wide networks."""
_KEPT = 2**24
"""Most weights of a matrix that are kept in float64; a larger matrix is converted for each product."""


class Near(NamedTuple):
    """Values in float64, and the largest honest distance of float32's from each."""

    value: Float64Array
    off: Float64Array

    def __mul__(self, other: "Near") -> "Near":  # type: ignore[override]
        value = self.value * other.value
        passed = np.abs(self.value) * other.off + (np.abs(other.value) + other.off) * self.off
        return Near(value, passed + UNIT * np.abs(value))

    def __add__(self, other: "Near") -> "Near":  # type: ignore[override]
        sizes = np.abs(self.value) + np.abs(other.value)
        return Near(self.value + other.value, self.off + other.off + UNIT * sizes)

    def __sub__(self, other: "Near") -> "Near":
        return self + Near(-other.value, other.off)


class Sums(NamedTuple):
    """Sums of products in float64, and the quantities that float32's error depends on; rows are in the first axes."""

    value: Float64Array
    sizes: Float32Array
    """Sum of the terms' absolute values."""
    terms: Float64Array
    """Number of terms that are not zero, [..., 1]."""
    passed: Float32Array
    """Error of the terms themselves."""

    def __add__(self, other: "Sums") -> "Sums":  # type: ignore[override]
        return Sums(
            self.value + other.value,
            self.sizes + other.sizes,
            self.terms + other.terms,
            self.passed + other.passed,
        )

    def at(self, index: int | tuple[slice, int]) -> "Sums":
        """Returns the sums of some rows."""
        return Sums(self.value[index], self.sizes[index], self.terms[index], self.passed[index])

    def repeated(self, times: int) -> "Sums":
        """Repeats the sums along the first axis."""
        return Sums(
            np.concatenate([self.value] * times),
            np.concatenate([self.sizes] * times),
            np.concatenate([self.terms] * times),
            np.concatenate([self.passed] * times),
        )

    def near(self) -> Near:
        """Returns the sums with their bounds."""
        factor = np.minimum(self.terms, 4 * np.sqrt(self.terms)) + EXTRA
        return Near(self.value, factor * UNIT * self.sizes + _SMALLEST + self.passed)

    def split(self, parts: int) -> Iterator["Sums"]:
        """Splits the outputs into equal parts, such as gates."""
        width = self.value.shape[-1] // parts
        for gate in (slice(part * width, (part + 1) * width) for part in range(parts)):
            yield Sums(self.value[..., gate], self.sizes[..., gate], self.terms, self.passed[..., gate])


class Matrix:
    """A product with a matrix of weights, and the addition of a bias.

    Args:
        weight: [outputs, inputs].
        bias: [outputs].
    """

    def __init__(self, weight: Float32Array, bias: Float32Array) -> None:
        self.weight = weight
        self.bias = bias
        self._kept = list(self._blocks()) if weight.size <= _KEPT else None

    def sums(self, inputs: Array, off: Float64Array | None = None) -> Sums:
        """Multiplies inputs [..., inputs], which are exact or have errors of their own."""
        parts = []
        for weight, sizes, bias in self._kept or self._blocks():
            # The bound does not need float64.
            size = np.abs(inputs).astype(np.float32) @ sizes + np.abs(bias)
            passed = np.zeros_like(size) if off is None else off.astype(np.float32) @ sizes
            parts.append((inputs @ weight + bias, size, passed))
        value, *bounds = (np.concatenate(arrays, axis=-1) for arrays in zip(*parts, strict=True))
        terms = 1 + np.count_nonzero(inputs, axis=-1, keepdims=True).astype(np.float64)
        return Sums(value, bounds[0], terms, bounds[1])

    def _blocks(self) -> Iterator[tuple[Float64Array, Float32Array, Float32Array]]:
        """Weights [inputs, outputs], their absolute values, and biases, some outputs at a time."""
        at_once = max(_BLOCK // self.weight.shape[1], 1)
        for start in range(0, len(self.weight), at_once):
            rows = slice(start, start + at_once)
            weight = np.ascontiguousarray(self.weight[rows].T)
            yield weight.astype(np.float64), np.abs(weight), self.bias[rows]


class ExactNetwork:
    """A network whose steps are computed in float64 from its float32 weights.

    Args:
        cell: The kind of every layer.
        scale: Mean and standard deviation of the inputs, [input_size] each.
        layers: Weights of each layer's inputs and of its state, as PyTorch has them.
        readout: Weights of the logits.

    Attributes:
        cell: As given.
        layers: As given.
        readout: As given.
    """

    def __init__(
        self,
        cell: Cell,
        scale: tuple[Float32Array, Float32Array] | None,
        layers: Iterable[tuple[Matrix, Matrix]],
        readout: Matrix,
    ) -> None:
        self.layers = tuple(layers)
        self.readout = readout
        self.cell = cell
        self._cell = _CELLS[cell]
        self._scale = None if scale is None else tuple(array.astype(np.float64) for array in scale)

    @classmethod
    def of(cls, weights: NetworkWeights) -> "ExactNetwork":
        """Makes the network of the kernel's weights."""
        layers = []
        for of_input, of_state, bias in weights.layers:
            apart = bias[len(of_input) :]  # of a GRU: its state has a bias of its own
            last = np.concatenate([np.zeros(len(of_input) - len(apart), np.float32), apart])
            layers.append((Matrix(of_input, bias[: len(of_input)]), Matrix(of_state, last)))
        return cls(weights.cell, weights.scale, layers, Matrix(weights.readout, weights.readout_bias))

    def inputs(self, x: Float32Array) -> Sums:
        """Products of the first layer with raw features [..., input_size]: all that a step needs of them."""
        rows = x.reshape(-1, x.shape[-1])
        at_once = max(_BLOCK // x.shape[-1], 1)
        multiply = self.layers[0][0].sums
        blocks = [multiply(self._standardized(rows[at : at + at_once])) for at in range(0, len(rows), at_once)]
        lead = x.shape[:-1]
        return Sums(*(np.concatenate(arrays).reshape(*lead, -1) for arrays in zip(*blocks, strict=True)))

    def step(self, inputs: Sums, state: Sequence[Array]) -> tuple[Near, ...]:
        """Computes the state after one timestep, [layers, rows, hidden_size] each.

        Args:
            inputs: Of `rows` raw features, by `inputs`.
            state: State before it, exact, as the result.
        """
        layers: list[tuple[Near, ...]] = []
        for layer, (of_input, of_state) in enumerate(self.layers):
            if layers:
                inputs = of_input.sums(*layers[-1][0])
            layers.append(self._cell(inputs, of_state, [tensor[layer].astype(np.float64) for tensor in state]))
        return tuple(
            Near(np.stack([near.value for near in tensor]), np.stack([near.off for near in tensor]))
            for tensor in zip(*layers, strict=True)
        )

    def logits(self, states: Near | Float32Array) -> Near:
        """Logits of states of the last layer, [..., hidden_size]."""
        return (self.readout.sums(*states) if isinstance(states, Near) else self.readout.sums(states)).near()

    def _standardized(self, x: Float32Array) -> Float64Array:
        values = x.astype(np.float64)
        if self._scale is not None:
            mean, std = self._scale
            values -= mean
            values /= std
        return values


def _simple(activation: Callable[[Near], Near]) -> "_Cell":
    def cell(inputs: Sums, of_state: Matrix, state: Sequence[Float64Array]) -> tuple[Near, ...]:
        return (activation((inputs + of_state.sums(state[0])).near()),)

    return cell


def _lstm(inputs: Sums, of_state: Matrix, state: Sequence[Float64Array]) -> tuple[Near, ...]:
    i, f, g, o = (gate.near() for gate in (inputs + of_state.sums(state[0])).split(4))
    memory = _sigmoid(f) * _exactly(state[1]) + _sigmoid(i) * _tanh(g)
    return _sigmoid(o) * _tanh(memory), memory


def _gru(inputs: Sums, of_state: Matrix, state: Sequence[Float64Array]) -> tuple[Near, ...]:
    return _gated(inputs, of_state, state[0], lambda reset, h, product: reset * product.near())


def _gru_reset_before(inputs: Sums, of_state: Matrix, state: Sequence[Float64Array]) -> tuple[Near, ...]:
    def candidate(reset: Near, h: Near, product: Sums) -> Near:
        return list(of_state.sums(*(reset * h)).split(3))[2].near()

    return _gated(inputs, of_state, state[0], candidate)


def _gated(
    inputs: Sums, of_state: Matrix, state: Float64Array, candidate: Callable[[Near, Near, Sums], Near]
) -> tuple[Near, ...]:
    h = _exactly(state)
    (r, z, n), (r_state, z_state, n_state) = inputs.split(3), of_state.sums(state).split(3)
    reset, update = (_sigmoid(sums.near()) for sums in (r + r_state, z + z_state))
    new = _tanh(n.near() + candidate(reset, h, n_state))
    return (new + update * (h - new),)


_Cell = Callable[[Sums, Matrix, Sequence[Float64Array]], tuple[Near, ...]]


def _exactly(values: Float64Array) -> Near:
    return Near(values, np.zeros_like(values))


def _tanh(near: Near) -> Near:
    value = np.tanh(near.value)
    # The steepest slope within the distance.
    slope = 1 - np.tanh(np.maximum(np.abs(near.value) - near.off, 0)) ** 2
    return _computed(value, slope * near.off)


def _sigmoid(near: Near) -> Near:
    half = np.tanh(np.maximum(np.abs(near.value) - near.off, 0) / 2)
    return _computed((1 + np.tanh(near.value / 2)) / 2, (1 - half**2) / 4 * near.off)


def _relu(near: Near) -> Near:
    return Near(np.maximum(near.value, 0), near.off)


def _computed(value: Float64Array, passed: Float64Array) -> Near:
    return Near(value, passed + (ULPS * 2 * np.abs(value) + UNITS) * UNIT)


_CELLS: dict[Cell, _Cell] = {
    "rnn_tanh": _simple(_tanh),
    "rnn_relu": _simple(_relu),
    "lstm": _lstm,
    "gru": _gru,
    "gru_reset_before": _gru_reset_before,
}
