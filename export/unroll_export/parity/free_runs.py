"""Free runs: cases that are run on, without a look at float64 between their steps.

A network can amplify rounding, in every implementation alike. So a free run may be as far from float64 as eager PyTorch
is itself, times a factor.
"""

import numpy as np

from unroll_engine.kernel.exact import UNIT, ExactNetwork, Float64Array, Near
from unroll_export.parity.cases import Drawn
from unroll_export.parity.judging import Judged, judge, worst
from unroll_export.parity.runners import Outputs, Runner, exact_step

FACTOR = 128
"""A free run may be so many times as far from float64 as eager PyTorch is."""
LOST = 0.01
"""Allowance from which on a free run is not judged: dynamics that amplify so much are a matter of chance."""
NUDGED = 7
"""Further runs of eager PyTorch, from states a rounding away: one run alone can be near by chance."""


class FreeRun:
    """Drawn values in float64, with the distance from it that eager PyTorch has.

    Attributes:
        expected: What eager PyTorch computes.
    """

    def __init__(self, drawn: Drawn, eager: Runner, exact: ExactNetwork) -> None:
        self._drawn, self._eager = drawn, eager
        self._rng, self._nudges_left = np.random.default_rng(0), NUDGED
        inputs, state = exact.inputs(drawn.x), drawn.initial_state.astype(np.float64)
        steps: list[Near] = []
        for time in range(drawn.x.shape[1]):
            steps.append(exact_step(exact, inputs.at((slice(None), time)), state))
            state = steps[-1].value
        last = len(exact.layers) - 1
        states = Near(*(np.stack([step[field][last] for step in steps], axis=1) for field in range(2)))
        self._right = exact.logits(states), states, steps[-1]
        self._distances: list[Float64Array] = [np.zeros((1, 1, 1))] * 3
        self.expected = eager.run(*drawn)
        self._add(self.expected)

    def judge(self, outputs: Outputs) -> Judged:
        """Judges one way of computing them. Eager PyTorch is run again only for what seems too far off."""
        while True:
            judged = worst(
                judge(values, Near(right.value, right.off + _allowed(distance)))
                for values, right, distance in zip(outputs, self._right, self._distances, strict=True)
            )
            if not judged.ratio > 1 or not self._nudges_left:
                return judged
            self._nudges_left -= 1
            x, state = self._drawn
            moves = self._rng.uniform(-2 * UNIT, 2 * UNIT, state.shape).astype(np.float32)
            self._add(self._eager.run(x, state + moves))

    def _add(self, run: Outputs) -> None:
        """Takes the distances of a run of eager PyTorch into account: the largest up to each step.

        They are over all rows and units. Where one is far off, others only chance not to be.
        """
        logits, states, final = (np.abs(got - right.value) for got, right in zip(run, self._right, strict=True))
        logits, states = (
            np.maximum.accumulate(each.max(axis=(0, 2), keepdims=True), axis=1) for each in (logits, states)
        )
        final = np.maximum(final.max(keepdims=True), states[:, -1:])
        self._distances = [np.maximum(*each) for each in zip(self._distances, (logits, states, final), strict=True)]


def _allowed(distance: Float64Array) -> Float64Array:
    """Distance that is allowed; infinite where that tells no more."""
    allowed = FACTOR * distance
    return np.where(allowed > LOST, np.inf, allowed)
