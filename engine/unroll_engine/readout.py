"""Conversion of logits to probabilities and classes."""

import numpy as np
from numpy.typing import NDArray

from unroll_engine.models.spec import Float32Array


def classify(logits: Float32Array) -> tuple[Float32Array, NDArray[np.intp]]:
    """Converts logits [n, output_size] to probabilities [n, classes] and the index of each row's most probable class.

    Softmax over several logits; the sigmoid of a single one, which is class 1's. Computed in float64: after rounding to
    float32, numpy's order of operations does not show.
    """
    wide = logits.astype(np.float64)
    if logits.shape[1] == 1:
        # Softmax of (0, z) is (1 - sigmoid(z), sigmoid(z)).
        wide = np.concatenate([np.zeros_like(wide), wide], axis=1)
    exponentials = np.exp(wide - np.maximum.reduce(wide, axis=1, keepdims=True))
    probabilities = exponentials / np.add.reduce(exponentials, axis=1, keepdims=True)
    return probabilities.astype(np.float32), wide.argmax(axis=1)
