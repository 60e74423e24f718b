"""Free runs: cases that run without a comparison with float64 between their steps.

A network can amplify rounding, in every implementation alike. So a free run may be as far from float64 as eager
PyTorch is, or as a float64 run with rounding at every step is, times a factor.
"""

from collections.abc import Iterable

import numpy as np

from unroll_engine.kernel.exact import ExactNetwork, Float64Array, Near
from unroll_export.parity.cases import Drawn
from unroll_export.parity.judging import Judged, judge, worst
from unroll_export.parity.runners import Float32Array, Outputs, Runner, exact_step

FACTOR = 128
"""Largest distance of a free run from float64, as a multiple of eager PyTorch's or of a rounded copy's."""
ROUNDED = 1 / 64
"""Rounding of a copy's states as a share of their bound: about as much as float32 rounds."""
COPIES = 8
"""Least number of rounded copies: a single one can be near by chance."""
LOST = 0.01
"""Tolerance from which a free run is not judged: dynamics that amplify so much are chaotic."""


class FreeRun:
    """Drawn values in float64, with the distance that a free run may have at each step.

    Attributes:
        expected: Results of eager PyTorch.
    """

    def __init__(self, drawn: Drawn, eager: Runner, exact: ExactNetwork) -> None:
        rows, time, _ = drawn.x.shape
        copies = 1 + -(-COPIES // rows)
        inputs = exact.inputs(drawn.x).repeated(copies)
        state = np.tile(drawn.initial_state.astype(np.float64), (1, copies, 1))
        rng = np.random.default_rng(0)
        steps: list[Near] = []
        for step in range(time):
            value, off = exact_step(exact, inputs.at((slice(None), step)), state)
            # The first rows are not rounded.
            state = value.copy()
            state[:, rows:] += ROUNDED * off[:, rows:] * rng.choice([-1.0, 1.0], off[:, rows:].shape)
            steps.append(Near(state, off))
        states = Near(*(np.stack([step[field] for step in steps], axis=2) for field in range(2)))
        top = len(exact.layers) - 1
        last = Near(states.value[top, :rows], states.off[top, :rows])
        final = Near(states.value[:, :rows, -1], states.off[:, :rows, -1])
        right = exact.logits(last), last, final
        self.expected = eager.run(*drawn)
        distances = [_distances(self.expected, right)]
        for copy in np.split(states.value, copies, axis=1)[1:]:
            logits = exact.logits(Near(copy[top], np.zeros_like(copy[top]))).value
            distances.append(_distances((logits, copy[top], copy[:, :, -1]), right))
        self._bounds = [
            Near(near.value, near.off + _allowed(np.maximum.reduce(each)))
            for near, *each in zip(right, *distances, strict=True)
        ]

    def judge(self, outputs: Outputs) -> Judged:
        """Judges one way of computing the values."""
        return worst(judge(got, bound) for got, bound in zip(outputs, self._bounds, strict=True))


def _distances(
    run: Iterable[Float32Array | Float64Array], right: Iterable[Near]
) -> tuple[Float64Array, Float64Array, Float64Array]:
    """Returns the largest distances of logits, states and final state from the right ones up to each step.

    They are over all rows and units: if one is far off, others are near only by chance.
    """
    logits, states, final = (np.abs(got - near.value) for got, near in zip(run, right, strict=True))
    logits, states = (np.maximum.accumulate(each.max(axis=(0, 2), keepdims=True), axis=1) for each in (logits, states))
    return logits, states, np.maximum(final.max(keepdims=True), states[:, -1:])


def _allowed(distance: Float64Array) -> Float64Array:
    """Returns the allowed distance; infinite if it is no longer informative."""
    allowed = FACTOR * distance
    return np.where(allowed > LOST, np.inf, allowed)
