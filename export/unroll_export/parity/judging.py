"""Judgement of float32 values by their distance from float64."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from unroll_engine.kernel.exact import Float64Array, Near
from unroll_export.parity.runners import Float32Array


class Judged(NamedTuple):
    """The value that is nearest to its bound, or farthest beyond it."""

    ratio: float
    """Ratio of the distance from float64 to the bound; NaN if a value is not a number."""
    bound: float


def judge(got: Float32Array | Float64Array, right: Near) -> Judged:
    """Compares values with their bounds."""
    return worst_ratio(np.abs(got - right.value), right.off)


def worst_ratio(distances: Float64Array, bounds: Float64Array) -> Judged:
    """Returns the largest ratio of distances to their bounds."""
    ratios = distances / bounds
    if not np.isfinite(ratios).all():
        return Judged(float("nan"), 0.0)
    worst = int(ratios.argmax())
    return Judged(float(ratios.flat[worst]), float(np.broadcast_to(bounds, ratios.shape).flat[worst]))


def worst(judged: Iterable[Judged]) -> Judged:
    """Returns the one with the largest ratio, or the first that is NaN."""
    return max(judged, key=lambda each: np.inf if np.isnan(each.ratio) else each.ratio)
