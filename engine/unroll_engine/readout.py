"""Conversion of logits to probabilities and classes."""

import math

import numpy as np
from numpy.typing import NDArray

from unroll_engine.errors import InvalidRequestError
from unroll_engine.models.spec import Float32Array, ModelSpec, StepSpec


def no_classes(spec: ModelSpec) -> InvalidRequestError:
    """Returns the error of a model without classes that is asked for some."""
    return InvalidRequestError(f"{spec.key} has no class labels: its outputs come from streams and sessions", "model")


def classify(logits: Float32Array, step: StepSpec | None = None) -> tuple[Float32Array, NDArray[np.intp]]:
    """Converts outputs [n, output_size] to probabilities [n, classes] and the index of each row's most probable class.

    Softmax over several logits; the sigmoid of a single one, which is class 1's. Computed in float64: after rounding to
    float32, numpy's order of operations does not show. Of a step model, the first output is used.
    """
    wide = logits.astype(np.float64)
    if step:
        wide = wide[:, : math.prod(step.outputs[0].shape)]
        if step.probabilities:
            given = np.concatenate([1 - wide, wide], axis=1) if wide.shape[1] == 1 else wide
            return given.astype(np.float32), given.argmax(axis=1)
    if wide.shape[1] == 1:
        # Softmax of (0, z) is (1 - sigmoid(z), sigmoid(z)).
        wide = np.concatenate([np.zeros_like(wide), wide], axis=1)
    exponentials = np.exp(wide - np.maximum.reduce(wide, axis=1, keepdims=True))
    probabilities = exponentials / np.add.reduce(exponentials, axis=1, keepdims=True)
    return probabilities.astype(np.float32), wide.argmax(axis=1)
