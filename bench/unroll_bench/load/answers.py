"""Checks of answers that need no model."""

import numpy as np
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from unroll_proto.v1 import unroll_pb2 as pb

# Largest difference of two answers without a promise of bits: each is within 1e-5 of eager PyTorch.
TOLERANCE = 2e-5
_REMEMBERED_BYTES = 64 << 20


class ClassifyCheck:
    """Checks the answers to one Classify request.

    The first one is checked in full: number of sequences, finite logits, probabilities that sum to 1, the label
    of the largest. Each further answer must be the same, bit for bit if the model promises that.

    Args:
        sequences: Sequences of the request.
        output_size: Logits of each sequence.
        bitwise: True if the model promises the same bits every time.
    """

    __slots__ = ("_bitwise", "_first", "_first_logits", "_outputs", "_sequences")

    def __init__(self, sequences: int, output_size: int, bitwise: bool) -> None:
        self._sequences = sequences
        self._outputs = output_size
        self._bitwise = bitwise
        self._first: bytes | None = None
        self._first_logits: NDArray[np.float32] | None = None

    def __call__(self, answer: bytes) -> bool:
        """Returns True if an answer, a serialized ClassifyResponse, is right."""
        # Equal bytes need no parsing, which is nearly all of them.
        if answer == self._first:
            return True
        logits = self._sound(answer)
        if logits is None:
            return False
        if self._first_logits is None:
            self._first, self._first_logits = answer, logits
            return True
        if self._bitwise:
            return logits.tobytes() == self._first_logits.tobytes()
        return bool(np.abs(logits - self._first_logits).max() <= TOLERANCE)

    def _sound(self, answer: bytes) -> NDArray[np.float32] | None:
        classes = max(self._outputs, 2)
        try:
            response = pb.ClassifyResponse.FromString(answer)
            logits = np.frombuffer(response.logits, "<f4").reshape(self._sequences, self._outputs)
            probabilities = np.frombuffer(response.probabilities, "<f4").reshape(self._sequences, classes)
        except (DecodeError, ValueError):
            return None
        # The single logit of a binary model is compared with 0.
        scores = logits if self._outputs > 1 else np.concatenate([np.zeros_like(logits), logits], axis=1)
        right = (
            np.isfinite(logits).all()
            and np.allclose(probabilities.sum(axis=1), 1, atol=1e-5)
            and len(response.labels) == self._sequences
            and list(response.label_indices) == scores.argmax(axis=1).tolist()
        )
        return logits if right else None


class StepsCheck:
    """Checks the states of sequences with the same values, or the outputs of a step model, which has no states.

    Those of a step must be the same in all sequences, wherever the server cuts its answers; bit for bit if the model
    promises that. The first of each step are checked in full.

    Args:
        width: Values of a state, or of the outputs.
        bitwise: True if the model promises the same bits every time.
    """

    def __init__(self, width: int, bitwise: bool) -> None:
        self._row = 4 * width
        self._bitwise = bitwise
        self._states: dict[int, bytes] = {}
        self._room = _REMEMBERED_BYTES // self._row

    def __call__(self, steps: pb.Steps) -> bool:
        """Returns True if an answer is right."""
        first, row, states = steps.first_step, self._row, steps.states or steps.logits
        if len(states) != steps.count * row:
            return False
        return all(self._same(first + index, states[index * row : (index + 1) * row]) for index in range(steps.count))

    def _same(self, number: int, state: bytes) -> bool:
        known = self._states.get(number)
        if known == state:
            return True
        values = np.frombuffer(state, "<f4")
        if known is None:
            if len(self._states) < self._room:
                self._states[number] = state
            return bool(np.isfinite(values).all())
        return not self._bitwise and bool(np.abs(values - np.frombuffer(known, "<f4")).max() <= TOLERANCE)
