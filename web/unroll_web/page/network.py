"""Recurrent networks in numpy: every gate of every step, and backpropagation through time.

Formulas and the order of gates are torch's: i, f, g, o of an LSTM, r, z, n of a GRU. `tests/unit/web` compares
gradients with autograd's.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating]

GATES = {
    "tanh": ("h",),
    "relu": ("h",),
    "lstm": ("input", "forget", "cell", "output"),
    "gru": ("reset", "update", "new"),
}
"""Gates by cell, in the order of the rows of the weights."""


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """Weights of a layer.

    Attributes:
        w_x: float [gates * hidden, inputs].
        w_h: float [gates * hidden, hidden].
        b_x: float [gates * hidden].
        b_h: float [gates * hidden].
    """

    w_x: Array
    w_h: Array
    b_x: Array
    b_h: Array

    @property
    def hidden(self) -> int:
        """Units of the layer."""
        return int(self.w_h.shape[1])


@dataclass(frozen=True, slots=True, eq=False)
class Trace:
    """One layer over T steps.

    Attributes:
        x: [T, inputs].
        h: [T + 1, hidden]; h[t + 1] is the output of step t.
        c: [T + 1, hidden] of an LSTM; zeros of other cells.
        gates: [T, gates, hidden], after their activations.
        recurrent_new: [T, hidden], the recurrent part of a GRU's new gate, before the reset gate; else zeros.
    """

    x: Array
    h: Array
    c: Array
    gates: Array
    recurrent_new: Array


@dataclass(frozen=True, slots=True, eq=False)
class Gradient:
    """Gradients of one layer.

    Attributes:
        h: [T, hidden], dL/dh_t, along every path.
        c: [T, hidden], dL/dc_t of an LSTM; zeros of other cells.
    """

    h: Array
    c: Array


@dataclass(frozen=True, slots=True, eq=False)
class Network:
    """A stack of layers with a linear readout.

    Attributes:
        cell: "tanh", "relu", "lstm" or "gru".
        mean: [features], subtracted from each timestep.
        std: [features], divides it.
        layers: The layers, the lowest first.
        w_y: [outputs, hidden].
        b_y: [outputs].
    """

    cell: str
    mean: Array
    std: Array
    layers: Sequence[Layer]
    w_y: Array
    b_y: Array

    def scaled(self, factor: float) -> "Network":
        """Returns the network with every recurrent matrix W_hh multiplied by a factor."""
        return replace(self, layers=tuple(replace(each, w_h=each.w_h * factor) for each in self.layers))

    def standardize(self, values: Array) -> Array:
        """Standardizes timesteps [T, features]."""
        return (values - self.mean) / self.std

    def forward(self, values: Array) -> list[Trace]:
        """Runs [T, features] from the zero state in float64; returns a trace for each layer."""
        x = self.standardize(values.astype(np.float64))
        traces: list[Trace] = []
        for layer in self.layers:
            traces.append(_trace(self.cell, layer, x))
            x = traces[-1].h[1:]
        return traces

    def logits(self, states: Array) -> Array:
        """Returns the readout [T, outputs] of states [T, hidden]."""
        return states @ self.w_y.T.astype(np.float64) + self.b_y

    def gradients(self, traces: Sequence[Trace], target: int) -> list[Gradient]:
        """Returns the gradients of L = -log p(target) after the last step, for each layer.

        Args:
            traces: Result of `forward`.
            target: Index of the class.
        """
        logits = self.logits(traces[-1].h[-1:])[0]
        steps = len(traces[-1].x)
        upstream: Array = np.zeros((steps, self.layers[-1].hidden))
        upstream[-1] = _loss_gradient(logits, target) @ self.w_y
        found = []
        for layer, trace in zip(reversed(self.layers), reversed(traces), strict=True):
            gradient, upstream = _backward(self.cell, layer, trace, upstream)
            found.append(gradient)
        return found[::-1]

    def spectral_radius(self, layer: int) -> float:
        """Returns the largest absolute eigenvalue of a layer's W_hh; of a gated cell, of its candidate's rows."""
        size = self.layers[layer].hidden
        row = {"lstm": 2, "gru": 2}.get(self.cell, 0) * size
        return float(np.abs(np.linalg.eigvals(self.layers[layer].w_h[row : row + size])).max())


def sigmoid(z: Array) -> Array:
    """Returns 1 / (1 + exp(-z)) without overflow."""
    return np.asarray(0.5 * (1 + np.tanh(0.5 * z)))


def step(cell: str, layer: Layer, x: Array, h: Array, c: Array) -> tuple[Array, Array, Array, Array]:
    """Computes one step of a layer.

    Args:
        cell: Kind of cell.
        layer: The weights.
        x: [inputs].
        h: [hidden], the state before.
        c: [hidden], the cell state before, of an LSTM.

    Returns:
        h and c after the step, the gates [gates, hidden], and a GRU's recurrent part of the new gate [hidden].
    """
    from_x = (layer.w_x @ x + layer.b_x).reshape(-1, layer.hidden)
    from_h = (layer.w_h @ h + layer.b_h).reshape(-1, layer.hidden)
    none = np.zeros_like(h)
    if cell == "lstm":
        z = from_x + from_h
        i, f, o = sigmoid(z[0]), sigmoid(z[1]), sigmoid(z[3])
        g = np.tanh(z[2])
        c = f * c + i * g
        return o * np.tanh(c), c, np.stack([i, f, g, o]), none
    if cell == "gru":
        r, u = sigmoid(from_x[0] + from_h[0]), sigmoid(from_x[1] + from_h[1])
        new = np.tanh(from_x[2] + r * from_h[2])
        return (1 - u) * new + u * h, none, np.stack([r, u, new]), from_h[2]
    z = from_x[0] + from_h[0]
    h = np.tanh(z) if cell == "tanh" else np.maximum(z, 0)
    return h, none, h[np.newaxis], none


def _trace(cell: str, layer: Layer, x: Array) -> Trace:
    steps, hidden = len(x), layer.hidden
    h, c, recurrent = np.zeros((steps + 1, hidden)), np.zeros((steps + 1, hidden)), np.zeros((steps, hidden))
    gates = np.zeros((steps, len(GATES[cell]), hidden))
    wide = Layer(*(np.asarray(each, np.float64) for each in (layer.w_x, layer.w_h, layer.b_x, layer.b_h)))
    for t in range(steps):
        h[t + 1], c[t + 1], gates[t], recurrent[t] = step(cell, wide, x[t], h[t], c[t])
    return Trace(x, h, c, gates, recurrent)


def _loss_gradient(logits: Array, target: int) -> Array:
    if len(logits) == 1:
        return np.asarray(sigmoid(logits) - target)
    exponentials = np.exp(logits - logits.max())
    gradient = exponentials / exponentials.sum()
    gradient[target] -= 1
    return np.asarray(gradient)


def _backward(cell: str, layer: Layer, trace: Trace, upstream: Array) -> tuple[Gradient, Array]:
    """Runs a layer backward.

    Args:
        cell: Kind of cell.
        layer: The weights.
        trace: The layer's trace.
        upstream: [T, hidden], dL/dh_t along the paths that leave the layer at step t.

    Returns:
        The gradients, and dL/dx_t [T, inputs] for the layer below.
    """
    steps, hidden = upstream.shape
    dh_all, dc_all, dx_all = np.zeros((steps, hidden)), np.zeros((steps, hidden)), np.zeros_like(trace.x)
    later_h, later_c = np.zeros(hidden), np.zeros(hidden)
    for t in range(steps - 1, -1, -1):
        dh = upstream[t] + later_h
        dc = later_c
        if cell == "lstm":
            i, f, g, o = trace.gates[t]
            squashed = np.tanh(trace.c[t + 1])
            dc = later_c + dh * o * (1 - squashed**2)
            di, df, dg, do = dc * g, dc * trace.c[t], dc * i, dh * squashed
            dz = np.concatenate([di * i * (1 - i), df * f * (1 - f), dg * (1 - g**2), do * o * (1 - o)])
            later_h, later_c, dz_x = dz @ layer.w_h, dc * f, dz
        elif cell == "gru":
            r, u, new = trace.gates[t]
            d_new = dh * (1 - u) * (1 - new**2)
            dr = d_new * trace.recurrent_new[t] * r * (1 - r)
            du = dh * (trace.h[t] - new) * u * (1 - u)
            dz_x = np.concatenate([dr, du, d_new])
            later_h = dh * u + np.concatenate([dr, du, d_new * r]) @ layer.w_h
        else:
            out = trace.h[t + 1]
            dz_x = dh * (1 - out**2 if cell == "tanh" else out > 0)
            later_h = dz_x @ layer.w_h
        dh_all[t], dc_all[t], dx_all[t] = dh, dc, dz_x @ layer.w_x
    return Gradient(dh_all, dc_all), dx_all
