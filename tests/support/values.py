"""Input of sequences: random values, and ways to cut them."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Float32Array = NDArray[np.float32]


def random_values(steps: int, seed: int = 0, features: int = 3) -> Float32Array:
    """Returns [steps, features] of the standard normal distribution, the same for the same arguments."""
    return np.random.default_rng(seed).normal(size=(steps, features)).astype(np.float32)


def cut(values: Float32Array, sizes: Sequence[int]) -> list[Float32Array]:
    """Cuts values [steps, features] into chunks of these sizes and the rest, without empty ones."""
    return [part for part in np.split(values, np.cumsum(sizes)) if len(part)]
