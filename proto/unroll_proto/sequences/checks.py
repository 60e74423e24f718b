"""Checks that all formats share: finite numbers, one feature count, known splits, representable names."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from unroll_proto.bundle import MOST_TEXT_BYTES
from unroll_proto.sequences.types import SPLITS, SequenceError

SEQUENCE, LABEL, SPLIT, ID = "sequence", "label", "split", "id"


def to_float32(values: NDArray[np.generic]) -> NDArray[np.float32]:
    """Copies numbers of any dtype into a new C-contiguous float32 array; numbers out of range become infinite."""
    with np.errstate(over="ignore", invalid="ignore"):
        return np.array(values, dtype=np.float32, order="C", copy=True)


def first_non_finite(values: NDArray[np.float32]) -> int | None:
    """Returns the flat index of the first NaN or infinity; None if all are finite."""
    # A finite sum proves that all terms are finite, without a temporary array.
    with np.errstate(over="ignore", invalid="ignore"):
        if np.isfinite(values.sum()):
            return None
    bad = np.flatnonzero(~np.isfinite(values.reshape(-1)))
    return int(bad[0]) if bad.size else None


def describe_non_finite(value: float, index: str) -> str:
    """Describes a number that is not a finite float32; `index` is its place, as in "[3][0]"."""
    if np.isfinite(value):
        return f"{index} is {value:g}, which is too large for float32"
    return f"{index} is {value:g}, a finite number expected"


class SequenceChecks:
    """Checks sequences one by one; all of a file must have the same number of features."""

    def __init__(self, path: Path, column: str | None = SEQUENCE) -> None:
        self._path = path
        self._column = column
        self._features: int | None = None

    def fail(self, what: str, row: int | None = None) -> SequenceError:
        """Makes an error about the values of `row`."""
        return SequenceError(self._path, what, row=row, column=self._column)

    def features(self, count: int, row: int, step: int = 0) -> None:
        """Compares the number of features of a timestep with that of the rows before.

        Raises:
            SequenceError: it is 0 or differs.
        """
        at = f"[{step}] has " if step else ""
        if count == 0:
            raise self.fail(f"{at}no features", row)
        if self._features is None:
            self._features = count
        elif count != self._features:
            before = "[0]" if step else "the rows before"
            raise self.fail(f"{at}{count} features, {self._features} expected as in {before}", row)

    def values(self, values: NDArray[np.generic], row: int) -> NDArray[np.float32]:
        """Checks the numbers of one sequence.

        Args:
            values: [steps, features], any integer or float dtype.
            row: 1-based position in the file.

        Returns:
            The values as a new float32 array.

        Raises:
            SequenceError: there are no steps, the features are none or differ, or a number is not a finite float32.
        """
        if len(values) == 0:
            raise self.fail("an empty sequence", row)
        self.features(values.shape[1], row)
        converted = to_float32(values)
        bad = first_non_finite(converted)
        if bad is not None:
            step, feature = divmod(bad, values.shape[1])
            raise self.fail(describe_non_finite(float(values[step, feature]), f"[{step}][{feature}]"), row)
        return converted


def check_split(path: Path, split: object, row: int, column: str = SPLIT) -> str | None:
    """Returns a split's name.

    Raises:
        SequenceError: there is no such split.
    """
    if split is None or (isinstance(split, str) and split in SPLITS):
        return split
    raise SequenceError(path, f"{split!r:.60} is none of {', '.join(SPLITS)}", row=row, column=column)


def check_name(path: Path, value: object, row: int, column: str) -> str | None:
    """Returns a label or id as a string that every format can hold.

    UTF-8 has no lone surrogates, numpy drops NULs at the end, and a bundle bounds its class labels.

    Raises:
        SequenceError: it is neither a string nor an integer, or one of the formats can't hold it.
    """
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (str, int, np.integer)):
        raise SequenceError(path, f"a string or an integer expected, got {value!r:.60}", row=row, column=column)
    text = str(value)
    try:
        size = len(text.encode())
    except UnicodeEncodeError as error:
        what = f"character {error.start} is {text[error.start]!a}, half of a surrogate pair; UTF-8 can't hold it"
        raise SequenceError(path, what, row=row, column=column) from None
    if "\0" in text:
        what = f"character {text.index(chr(0))} is NUL; not every format can hold it"
        raise SequenceError(path, what, row=row, column=column)
    if size > MOST_TEXT_BYTES:
        raise SequenceError(path, f"{size} bytes in UTF-8, {MOST_TEXT_BYTES} at most", row=row, column=column)
    return text
