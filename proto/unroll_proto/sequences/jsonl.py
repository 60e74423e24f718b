"""JSON Lines: an object per line with a key for the sequence, and optionally for label, split and id."""

import json
from collections.abc import Iterator
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from unroll_proto.sequences.checks import SEQUENCE, Reading
from unroll_proto.sequences.types import Sequence, SequenceError

# A Python float, since it compares with integers of any size.
MAX_FLOAT32 = float(np.finfo(np.float32).max)


def read_jsonl(file: IO[bytes], reading: Reading) -> Iterator[Sequence | SequenceError]:
    """Reads line by line; empty lines are skipped, and `row` is the line's number."""
    key = reading.name(SEQUENCE)
    for index, row, line in numbered(file, reading.skip):
        try:
            record = parse(reading, line, row)
            if key not in record:
                raise reading.fail(f"missing; the keys are {sorted(record)!r:.200}", row, key)
            values = as_array(reading, record[key], row, key, plain=b"true" not in line and b"false" not in line)
            yield reading.make(index, row, values, record)
        except SequenceError as error:
            yield error


def numbered(file: IO[bytes], skip: int = 0) -> Iterator[tuple[int, int, bytes]]:
    """Yields the lines that are not empty: the index from 0, the line's number from 1, and the line."""
    index = -1
    for row, line in enumerate(file, 1):
        if line.strip():
            index += 1
            if index >= skip:
                yield index, row, line


def parse(reading: Reading, line: bytes, row: int) -> dict[str, Any]:
    """Parses a line.

    Raises:
        SequenceError: it is not a JSON object in UTF-8.
    """
    try:
        record = json.loads(line.decode("utf-8-sig" if row == 1 else "utf-8"))
    except UnicodeDecodeError as error:
        raise reading.fail(f"not UTF-8 text: {error.reason} at byte {error.start}", row) from None
    except (ValueError, RecursionError) as error:
        raise reading.fail(f"not JSON: {error}", row) from None
    if not isinstance(record, dict):
        raise reading.fail(f"a JSON object expected, got {_kind(record)}", row)
    return record


def as_array(reading: Reading, value: object, row: int, column: str, *, plain: bool = False) -> NDArray[np.generic]:
    """Converts nested lists to an array [steps, features]; a list of numbers is a sequence of one feature.

    Args:
        reading: The file.
        value: The lists.
        row: 1-based position in the file.
        column: Name of the column, for errors.
        plain: True if no booleans can be in it.

    Raises:
        SequenceError: it is something else; the error names the place that is not a number.
    """
    if isinstance(value, list) and value:
        try:
            array = np.asarray(value)
        except (ValueError, OverflowError):
            array = np.empty(0, dtype=object)
        # numpy takes true and false for numbers; they are rare enough for a closer check.
        if plain and array.ndim in (1, 2) and array.dtype.kind in "iuf":
            return array.reshape(len(array), -1)
    rows = _checked(reading, value, row, column)
    return np.array(rows, dtype=np.float64).reshape(len(rows), len(rows[0]))


def _checked(reading: Reading, value: object, row: int, column: str) -> list[list[float]]:
    """Finds the first bad value, for the message; slow, so only used after a check has failed."""
    if not isinstance(value, list):
        raise reading.fail(f"a list of lists of numbers expected, got {_kind(value)}", row, column)
    if not value:
        raise reading.fail("an empty sequence", row, column)
    flat = not any(isinstance(features, list) for features in value)
    rows = [[number] for number in value] if flat else value
    for step, features in enumerate(rows):
        if not isinstance(features, list):
            raise reading.fail(f"[{step}] is {_kind(features)}, a list of numbers expected", row, column)
        if len(features) != len(rows[0]):
            what = f"[{step}] has {len(features)} features, {len(rows[0])} expected as in [0]"
            raise reading.fail(what, row, column)
        for feature, number in enumerate(features):
            place = f"[{step}]" if flat else f"[{step}][{feature}]"
            if isinstance(number, bool) or not isinstance(number, int | float):
                raise reading.fail(f"{place} is {_kind(number)}, a number expected", row, column)
            if isinstance(number, int) and abs(number) > MAX_FLOAT32:
                raise reading.fail(f"{place} is too large for float32", row, column)
    return rows


def _kind(value: object) -> str:
    """Returns JSON's name of a value's type."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    names = {dict: "an object", list: "a list", str: "a string", int: "a number", float: "a number"}
    return names[type(value)]
