"""Conversion of logits to class probabilities, to the server's bits."""

import math

import numpy as np

from unroll_client import ModelInfo
from unroll_web.page.frames import Float32Array


def class_logits(model: ModelInfo) -> int:
    """Returns how many of a timestep's outputs are class logits; 0 if the model has no classes."""
    if not model.class_labels:
        return 0
    return math.prod(model.outputs[0].shape) if model.architecture == "step" else model.output_size


def probabilities(logits: Float32Array) -> Float32Array:
    """Converts logits [n, outputs] to probabilities [n, classes], as Classify answers them.

    Softmax over several logits; (1 - sigmoid, sigmoid) of a single one. Computed in float64 and rounded once.
    """
    wide = logits.astype(np.float64)
    if wide.shape[1] == 1:
        wide = np.concatenate([np.zeros_like(wide), wide], axis=1)
    exponentials = np.exp(wide - wide.max(axis=1, keepdims=True))
    shares: Float32Array = (exponentials / np.add.reduce(exponentials, axis=1, keepdims=True)).astype(np.float32)
    return shares
