"""Arithmetic of one step, and gradients of an answer, for the page."""

from typing import Any

import numpy as np

from unroll_web.page.frames import Float32Array
from unroll_web.page.network import GATES, Array, Layer, Network, step

MOST_GRADIENT_STEPS = 4096
"""Steps that a gradient goes back."""


def unit_arithmetic(
    network: Network, layer: int, unit: int, x: Float32Array, h: Float32Array, c: Float32Array
) -> dict[str, Any]:
    """Shows how a unit gets its value in one step, from the numbers that the server answered.

    Args:
        network: The network.
        layer: 0-based layer.
        unit: 0-based unit.
        x: [inputs], the layer's input: raw features for layer 0, else the state of the layer below after the step.
        h: [hidden], the layer's state before the step.
        c: [hidden], its cell state before, of an LSTM; else zeros.

    Returns:
        The value, and for each gate the products of its sum; `units` has the gates of all units.

    Raises:
        ValueError: there is no such layer or unit.
    """
    if not 0 <= layer < len(network.layers):
        raise ValueError(f"layer: {layer}, the model has 0 to {len(network.layers) - 1}")
    weights = network.layers[layer]
    if not 0 <= unit < weights.hidden:
        raise ValueError(f"unit: {unit}, the layer has 0 to {weights.hidden - 1}")
    inputs: Array = network.standardize(x) if layer == 0 else x
    wide = Layer(*(np.asarray(each, np.float64) for each in (weights.w_x, weights.w_h, weights.b_x, weights.b_h)))
    after, cell, gates, _ = step(network.cell, wide, inputs, h, c)
    terms = []
    for index, name in enumerate(GATES[network.cell]):
        row = index * weights.hidden + unit
        terms.append(
            {
                "gate": name,
                "x": _list(wide.w_x[row] * inputs),
                "h": _list(wide.w_h[row] * h),
                "wx": _list(wide.w_x[row]),
                "wh": _list(wide.w_h[row]),
                "bx": float(wide.b_x[row]),
                "bh": float(wide.b_h[row]),
                "value": float(gates[index, unit]),
            }
        )
    return {
        "cell": network.cell,
        "inputs": _list(inputs),
        "terms": terms,
        "value": float(after[unit]),
        "h": float(h[unit]),
        "hs": _list(h),
        "c": float(c[unit]),
        "cell_value": float(cell[unit]),
        "units": [_list(row) for row in gates],
    }


def analysis(
    network: Network, values: Float32Array, target: int, factor: float
) -> tuple[dict[str, Any], dict[str, Array]]:
    """Computes gradients of L = -log p(target) after the last step, of a copy whose W_hh is scaled.

    Args:
        network: The network; it is not changed.
        values: [steps, features], from the zero state.
        target: Index of the class; -1 for the most probable one.
        factor: Factor of every W_hh; 1 for the served network.

    Returns:
        A header, and arrays: `gradient` [layers, steps] of norms |dL/dh_t|, `cells` likewise of an LSTM's c, `states`
        [steps, hidden] of the last layer, `logits` [steps, outputs].

    Raises:
        ValueError: there are too many steps, or no such class.
    """
    if not 1 <= len(values) <= MOST_GRADIENT_STEPS:
        raise ValueError(f"step: a gradient needs 1 to {MOST_GRADIENT_STEPS} steps, got {len(values)}")
    changed = network if factor == 1 else network.scaled(factor)
    traces = changed.forward(values)
    states = traces[-1].h[1:]
    logits = changed.logits(states)
    classes = max(2, logits.shape[1])
    if target == -1:
        target = int(logits[-1].argmax()) if logits.shape[1] > 1 else int(logits[-1, 0] > 0)
    if not 0 <= target < classes:
        raise ValueError(f"target: {target}, the model has classes 0 to {classes - 1}")
    gradients = changed.gradients(traces, target)
    header = {"target": target, "radius": [changed.spectral_radius(index) for index in range(len(network.layers))]}
    arrays: dict[str, Array] = {
        "gradient": np.stack([np.linalg.norm(each.h, axis=1) for each in gradients]),
        "states": states,
        "logits": logits,
    }
    if network.cell == "lstm":
        arrays["cells"] = np.stack([np.linalg.norm(each.c, axis=1) for each in gradients])
    return header, arrays


def _list(array: Array) -> list[float]:
    return [float(each) for each in array]
