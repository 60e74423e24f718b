"""Conversion of logits to probabilities and classes."""

import math

import numpy as np
from numpy.typing import NDArray

from unroll_engine.errors import InvalidRequestError
from unroll_engine.models.spec import Float32Array, ModelSpec, StepSpec


def no_classes(spec: ModelSpec) -> InvalidRequestError:
    """Returns the error of a model without classes that is asked for some."""
    source = "ModelInfer" if spec.whole else "streams and sessions"
    return InvalidRequestError(f"{spec.key} has no class labels: its outputs come from {source}", "model")


def check_has_state(spec: ModelSpec, field: str) -> None:
    """Checks that a model can be asked for steps and states.

    Args:
        spec: The model.
        field: Field of the request that asks for them.

    Raises:
        InvalidRequestError: it takes whole sequences only.
    """
    if spec.whole:
        problem = (
            f"{spec.key} takes whole sequences only, since it looks at more than the past (a bidirectional layer, or "
            "pooling or attention over time): Classify them, or ModelInfer without a sequence_id"
        )
        raise InvalidRequestError(problem, field)


def classify(logits: Float32Array, step: StepSpec | None = None) -> tuple[Float32Array, NDArray[np.intp]]:
    """Converts outputs [n, output_size] to probabilities [n, classes] and the index of each row's most probable class.

    Softmax over several logits, in float64; the sigmoid of a single one, which is class 1's. Of a step model, the first
    output is used.
    """
    # Classes first, since numpy sums over the outer axis in half of the time.
    wide = logits.T.astype(np.float64, order="C")
    if step:
        wide = wide[: math.prod(step.outputs[0].shape)]
    are_probabilities = step is not None and step.probabilities
    if len(wide) == 1:
        # Softmax of (0, z) is (1 - sigmoid(z), sigmoid(z)).
        wide = np.concatenate([1 - wide if are_probabilities else np.zeros_like(wide), wide])
    labels = wide.argmax(axis=0)
    if not are_probabilities:
        wide = np.exp(wide - np.maximum.reduce(wide))
        # Class by class in every case: numpy would add up a single row in another order.
        wide /= np.add.reduce(wide) if wide.shape[1] > 1 else np.add.accumulate(wide)[-1]
    return wide.T.astype(np.float32, order="C"), labels
