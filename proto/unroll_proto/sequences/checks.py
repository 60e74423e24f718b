"""Checks that all formats share: finite numbers, one feature count, known splits, representable names."""

import math
from collections.abc import Iterable, Iterator, Mapping
from decimal import Decimal

import numpy as np
from numpy.typing import NDArray

from unroll_proto.bundle import MOST_TEXT_BYTES
from unroll_proto.sequences.files import Source
from unroll_proto.sequences.types import SPLITS, Block, Columns, Expected, Sequence, SequenceError

SEQUENCE, LABEL, SPLIT, ID, TIME = "sequence", "label", "split", "id", "time"


def to_float32(values: NDArray[np.generic]) -> NDArray[np.float32]:
    """Copies numbers of any dtype into a new C-contiguous float32 array; numbers out of range become infinite."""
    with np.errstate(over="ignore", invalid="ignore"):
        return np.array(values, dtype=np.float32, order="C", copy=True)


def non_finite(values: NDArray[np.float32]) -> NDArray[np.int64]:
    """Returns the flat indices of NaN and infinities, int64 [found]."""
    # A finite sum proves that all terms are finite, without a temporary array.
    with np.errstate(over="ignore", invalid="ignore"):
        if np.isfinite(values.sum()):
            return np.empty(0, np.int64)
    return np.flatnonzero(~np.isfinite(values.reshape(-1)))


def describe_non_finite(value: float, index: str = "") -> str:
    """Describes a number that is not a finite float32; `index` is its place, as in "[3][0]"."""
    place = f"{index} is " if index else ""
    if np.isfinite(value):
        return f"{place}{value:g}, which is too large for float32"
    return f"{place}{value:g}, a finite number expected"


class Reading:
    """One pass over a file: the request, and the checks that all formats share.

    Args:
        source: The file.
        columns: Names of the columns to read.
        expected: Features that the sequences must have; None to take those of the first one for all.
        sequences: Most sequences of a block.
        values: Most numbers of a block.
        skip: Sequences at the beginning of the file, refused ones included, to leave out. A block begins after them.
    """

    def __init__(
        self, source: Source, columns: Columns, expected: Expected | None, sequences: int, values: int, skip: int = 0
    ) -> None:
        self.source, self.columns, self.expected = source, columns, expected
        self.sequences, self.values, self.skip = sequences, values, skip
        self._width = len(expected.names) if expected else None
        self._because = f"{expected.by} has {self._width}" if expected else ""

    def fail(self, what: str, row: int | None = None, column: str | None = None) -> SequenceError:
        """Makes an error about the file."""
        return SequenceError(self.source.name, what, row=row, column=column)

    def name(self, role: str) -> str:
        """Returns the column's name of a role, "sequence", "id", "time", "label" or "split"."""
        given: str | None = getattr(self.columns, role, None)
        return given or role

    def default_id(self, index: int) -> str:
        """Returns the id of a sequence without an own one; `index` counts the file's sequences from 0."""
        return f"{self.source.prefix}{index}"

    def width(self, found: int) -> int:
        """Returns the number of features that every timestep must have: the first one that was found sets it."""
        if self._width is None and found:
            self._width = found
        return self._width or 1

    def describe_width(self, count: int, step: int = 0) -> str:
        """Describes a timestep whose number of features is none or another."""
        at = f"[{step}] has " if step else ""
        if not count:
            return f"{at}no features"
        if self._because and not step:
            return f"{count} features, {self._because}"
        return f"{at}{count} features, {self._width} expected as in {'[0]' if step else 'the rows before'}"

    def check(self, values: NDArray[np.generic], row: int, column: str) -> NDArray[np.float32]:
        """Checks the numbers of one sequence.

        Args:
            values: [steps, features], any integer or float dtype.
            row: 1-based position in the file.
            column: Name of the column, for the error.

        Returns:
            The values as a new float32 array.

        Raises:
            SequenceError: there are no steps, the features are none or differ, or a number is not a finite float32.
        """
        if len(values) == 0:
            raise self.fail("an empty sequence", row, column)
        count = values.shape[1]
        if not count or count != (self._width or count):
            raise self.fail(self.describe_width(count), row, column)
        converted = to_float32(values)
        bad = non_finite(converted)
        if bad.size:
            step, feature = divmod(int(bad[0]), count)
            raise self.fail(describe_non_finite(float(values[step, feature]), f"[{step}][{feature}]"), row, column)
        self.width(count)
        return converted

    def make(
        self,
        index: int,
        row: int,
        values: NDArray[np.generic],
        names: Mapping[str, object],
        column: str | None = None,
        plural: str = "",
    ) -> Sequence:
        """Checks one sequence.

        Args:
            index: Number of the sequence in the file, from 0.
            row: 1-based position in the file.
            values: [steps, features], any integer or float dtype.
            names: Values of the columns of id, label and split; the partitions have those that are missing.
            column: Name of the values, for errors; None for the column of sequences.
            plural: End of the names of the columns of id, label and split, for errors.

        Raises:
            SequenceError: it can't be used.
        """
        checked = self.check(values, row, column or self.name(SEQUENCE))
        found = []
        for role in (ID, LABEL, SPLIT):
            key = self.name(role)
            value = names.get(key, self.source.partitions.get(key))
            found.append(value if value is None else check_name(self.source.name, value, row, key + plural))
        name, label, split = found
        check_split(self.source.name, split, row, SPLIT + plural)
        return Sequence(self.default_id(index) if name is None else name, checked, label, split, row)


def gather(reading: Reading, rows: Iterable[Sequence | SequenceError]) -> Iterator[Block]:
    """Gathers sequences and refused rows into blocks; an error that is raised meanwhile comes after the last block."""
    held: list[Sequence] = []
    refused: list[SequenceError] = []
    size = 0
    failure = None
    try:
        for row in rows:
            large = isinstance(row, Sequence) and size + row.values.size > reading.values
            if (held or refused) and (large or len(held) + len(refused) == reading.sequences):
                yield Block.of(held, refused)
                held, refused, size = [], [], 0
            if isinstance(row, Sequence):
                held.append(row)
                size += row.values.size
            else:
                refused.append(row)
    except SequenceError as error:
        failure = error
    if held or refused:
        yield Block.of(held, refused)
    if failure is not None:
        raise failure


def check_split(file: str, split: object, row: int, column: str = SPLIT) -> str | None:
    """Returns a split's name.

    Raises:
        SequenceError: there is no such split.
    """
    if split is None or (isinstance(split, str) and split in SPLITS):
        return split
    raise SequenceError(file, f"{split!r:.60} is none of {', '.join(SPLITS)}", row=row, column=column)


def check_name(file: str, value: object, row: int, column: str) -> str | None:
    """Returns a label or id as a string that every format can hold; None for null and NaN.

    Integers, and floats and decimals of a whole value, are written as integers: pandas makes floats of integers with
    gaps. Booleans are written "true" and "false".

    UTF-8 has no lone surrogates, numpy drops NULs at the end, and a bundle bounds its class labels.

    Raises:
        SequenceError: it is something else, or one of the formats can't hold it.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or (isinstance(value, float | Decimal) and math.isnan(value)):
        return None
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float | Decimal) and math.isfinite(value) and value == int(value):
        value = int(value)
    if not isinstance(value, str | int):
        raise SequenceError(file, f"a string or an integer expected, got {value!r:.60}", row=row, column=column)
    text = str(value) if isinstance(value, str) or abs(value) < 10**MOST_TEXT_BYTES else "9" * (MOST_TEXT_BYTES + 1)
    try:
        size = len(text.encode())
    except UnicodeEncodeError as error:
        what = f"character {error.start} is {text[error.start]!a}, half of a surrogate pair; UTF-8 can't hold it"
        raise SequenceError(file, what, row=row, column=column) from None
    if "\0" in text:
        what = f"character {text.index(chr(0))} is NUL; not every format can hold it"
        raise SequenceError(file, what, row=row, column=column)
    if size > MOST_TEXT_BYTES:
        raise SequenceError(file, f"{size} bytes in UTF-8, {MOST_TEXT_BYTES} at most", row=row, column=column)
    return text
