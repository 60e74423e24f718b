"""Comparison of two computations of the same case: shapes, and values whose bits differ."""

import numpy as np
from numpy.typing import NDArray

from unroll_export.parity.cases import Drawn, Plan
from unroll_export.parity.runners import Float32Array, Outputs, ParityError, Runner


def differing_values(got: Outputs, expected: Outputs) -> int:
    """Counts the values whose bits differ, over all outputs; -0 and 0 differ, equal NaNs do not.

    Raises:
        ParityError: an output has an unexpected shape or dtype.
    """
    check_alike(got, expected)
    return sum(int(np.count_nonzero(_bits(a) != _bits(b))) for a, b in zip(got, expected, strict=True))


def check_alike(got: Outputs, expected: Outputs) -> None:
    """Raises ParityError if an output has an unexpected shape or dtype."""
    for name, a, b in zip(Outputs._fields, got, expected, strict=True):
        if a.shape != b.shape or a.dtype != b.dtype:
            raise ParityError(f"{name} is {a.dtype} {a.shape}, expected {b.dtype} {b.shape}")


def run_cut(runner: Runner, plan: Plan, drawn: Drawn) -> Outputs:
    """Computes a case in its second way: groups of rows separately, chunks of time with the state carried."""
    groups = []
    for rows in plan.groups:
        state, chunks = drawn.initial_state[:, rows], []
        for steps in plan.chunks:
            chunks.append(runner.run(drawn.x[rows, steps], state))
            state = chunks[-1].final_state
        groups.append(joined_in_time(chunks))
    return Outputs(
        logits=np.concatenate([group.logits for group in groups]),
        states=np.concatenate([group.states for group in groups]),
        final_state=np.concatenate([group.final_state for group in groups], axis=1),
    )


def joined_in_time(chunks: list[Outputs]) -> Outputs:
    """Joins the outputs of consecutive chunks."""
    return Outputs(
        logits=np.concatenate([chunk.logits for chunk in chunks], axis=1),
        states=np.concatenate([chunk.states for chunk in chunks], axis=1),
        final_state=chunks[-1].final_state,
    )


def _bits(array: Float32Array) -> NDArray[np.uint32]:
    return np.ascontiguousarray(array).view(np.uint32)
