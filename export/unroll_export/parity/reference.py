"""What eager PyTorch makes of a case, and how far rounding alone can carry it."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from unroll_export.parity.cases import Case
from unroll_export.parity.compare import joined_in_time, step_differences
from unroll_export.parity.runners import Float32Array, Outputs, Runner

FORCED_LANES = 4096
"""Single steps that are run as one batch, at most; bounds the memory of long cases."""
DRAWS = 8
ROUNDING = 2.0**-23
"""What each state is moved by at most: the distance of float32 values around 1."""


class ForcedSteps(NamedTuple):
    """Single steps of a case, each a row of its own that starts from eager's state before it."""

    x: Float32Array
    """[rows, 1, features]."""
    initial_state: Float32Array
    """[layers, rows, hidden]."""
    expected: Outputs
    """What eager makes of them."""


class Reference:
    """Eager PyTorch on one case.

    Args:
        eager: Runs the network.
        case: The case.
        free: Steps that an artifact may run without being set right, at most.

    Attributes:
        free: The same, within the case's length.
        expected: What eager makes of the free steps.
    """

    def __init__(self, eager: Runner, case: Case, free: int) -> None:
        self._eager = eager
        self._case = case
        self.free = min(free, case.plan.time)
        self.expected = eager.run(case.x[:, : self.free], case.initial_state)

    def spread(self, rows: NDArray[np.intp]) -> Float32Array:
        """How far eager comes from itself when every state is moved by its rounding, up to each free step.

        Small (a few times the rounding) where the network forgets; growing with the steps where it amplifies.

        Returns:
            [rows, free]; the largest of several draws.
        """
        x, initial_state = self._case.x[rows], self._case.initial_state[:, rows]
        expected = Outputs(self.expected.logits[rows], self.expected.states[rows], self.expected.final_state[:, rows])
        rng = np.random.default_rng(0)
        largest = np.zeros((len(rows), self.free), np.float32)
        for _ in range(DRAWS):
            state, steps = initial_state, []
            for step in range(self.free):
                moved = state + rng.uniform(-ROUNDING, ROUNDING, state.shape).astype(np.float32)
                steps.append(self._eager.run(x[:, step : step + 1], moved))
                state = steps[-1].final_state
            largest = np.maximum(largest, step_differences(joined_in_time(steps), expected))
        running: Float32Array = np.maximum.accumulate(largest, axis=1)
        return running

    def forced_steps(self, start: int) -> Iterator[ForcedSteps]:
        """The steps from `start` (0 or `free`) on, as batches of single steps."""
        x = self._case.x
        state = self.expected.final_state if start else self._case.initial_state
        at_once = max(FORCED_LANES // len(x), 1)
        for first in range(start, x.shape[1], at_once):
            steps = range(first, min(first + at_once, x.shape[1]))
            states, outputs = [], []
            for step in steps:
                states.append(state)
                outputs.append(self._eager.run(x[:, step : step + 1], state))
                state = outputs[-1].final_state
            yield ForcedSteps(
                x=np.concatenate([x[:, step : step + 1] for step in steps]),
                initial_state=np.concatenate(states, axis=1),
                expected=Outputs(
                    logits=np.concatenate([output.logits for output in outputs]),
                    states=np.concatenate([output.states for output in outputs]),
                    final_state=np.concatenate([output.final_state for output in outputs], axis=1),
                ),
            )
