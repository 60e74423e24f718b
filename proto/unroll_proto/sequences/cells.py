"""Cells of Arrow's columns: names, numbers and lists of timesteps, converted and checked many at a time."""

import json
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from unroll_proto.bundle import MOST_TEXT_BYTES
from unroll_proto.sequences.checks import (
    SEQUENCE,
    Reading,
    check_name,
    describe_non_finite,
    non_finite,
    to_float32,
)
from unroll_proto.sequences.jsonl import as_array
from unroll_proto.sequences.types import SequenceError

# Words for a missing number, as spreadsheets, R, pandas and Weka write them.
_GAPS = frozenset(("", "na", "n/a", "nan", "null", "none", "#n/a", "?"))
_LISTS = "a list of lists of numbers"


def is_number(kind: Any) -> bool:
    """True if cells of Arrow's type `kind` are numbers or booleans."""
    kinds = pa.types
    checks = (kinds.is_floating, kinds.is_integer, kinds.is_decimal, kinds.is_boolean)
    return any(check(kind) for check in checks)


def strings(
    reading: Reading, column: Any, rows: NDArray[np.int64], name: str, problems: dict[int, SequenceError]
) -> list[str | None]:
    """Converts labels or ids.

    Args:
        reading: The file.
        column: The cells [n].
        rows: int64 [n], 1-based row of each in the file.
        name: Name of the column.
        problems: Takes the errors by index.

    Raises:
        SequenceError: the column is of another kind.
    """
    column = _one(column)
    kind = column.type
    if not (is_text(kind) or is_number(kind) or pa.types.is_null(kind)):
        raise reading.fail(f"strings or integers expected, got {kind}", column=name)
    if is_text(kind) or pa.types.is_integer(kind) or pa.types.is_null(kind):
        try:
            column = column.cast(pa.string())
            # One check of all: it is rare that one of them can't be used.
            if (pc.max(pc.binary_length(column)).as_py() or 0) <= MOST_TEXT_BYTES and not pc.any(
                pc.match_substring(column, "\0")
            ).as_py():
                return list(column.to_pylist())
        except (UnicodeDecodeError, pa.ArrowException):
            pass
    found: list[str | None] = []
    for index, (cell, row) in enumerate(zip(column, rows.tolist(), strict=True)):
        try:
            found.append(check_name(reading.source.name, cell.as_py(), row, name))
        except UnicodeDecodeError:  # Arrow doesn't check a file's strings when it reads them.
            problems.setdefault(index, reading.fail("not UTF-8 text", row, name))
            found.append(None)
        except SequenceError as error:
            problems.setdefault(index, error)
            found.append(None)
    return found


def numbers(
    reading: Reading, column: Any, rows: NDArray[np.int64], name: str, problems: dict[int, SequenceError]
) -> NDArray[np.float64]:
    """Converts numbers, also such in strings; NaN where there is none. Arguments and errors as in `strings`."""
    column = _one(column)
    kind = column.type
    if pa.types.is_boolean(kind):
        column = column.cast(pa.int8())
    elif pa.types.is_dictionary(kind):
        column = column.dictionary_decode()
    elif not (is_number(kind) or is_text(kind) or pa.types.is_null(kind)):
        raise reading.fail(f"numbers expected, got {kind}", column=name)
    try:
        converted = column.cast(pa.float64(), safe=False).fill_null(np.nan)
        return np.asarray(converted.to_numpy(zero_copy_only=False))
    except (pa.ArrowException, UnicodeDecodeError):
        pass
    found = np.full(len(column), np.nan)
    for index, cell in enumerate(column):
        try:
            text = str(cell.as_py() or "").strip()
            if text.lower() not in _GAPS:
                found[index] = float(text)
        except ValueError:
            what = "not UTF-8 text" if isinstance(cell, bytes) else f"{text!r:.60} is not a number"
            problems.setdefault(index, reading.fail(what, int(rows[index]), name))
    return found


def nested(
    reading: Reading, column: Any, rows: NDArray[np.int64]
) -> tuple[NDArray[np.float32], NDArray[np.int64], dict[int, SequenceError]]:
    """Converts whole sequences: lists of timesteps, lists of numbers, tensors, or any of these as JSON in strings.

    Returns:
        float32 [total steps, features] and int64 [sequences], the values and lengths of those without a problem; and
        the problems by index.

    Raises:
        SequenceError: the column is of another kind.
    """
    column, name = _one(column), reading.name(SEQUENCE)
    if is_text(column.type) or pa.types.is_null(column.type):
        return _parsed(reading, column, rows)
    if not _is_sequence(column.type):
        raise reading.fail(f"{_LISTS} expected, got {column.type}", column=name)
    problems: dict[int, SequenceError] = {}
    kept = np.arange(len(column))
    while True:
        converted = _ragged(reading, column)
        if not isinstance(converted, dict):
            return *converted, problems
        for index, what in converted.items():
            row = int(rows[kept[index]])
            problems[int(kept[index])] = reading.fail(what, row, name)
        good = np.setdiff1d(np.arange(len(column)), list(converted))
        kept, column = kept[good], column.take(pa.array(good))


def _parsed(
    reading: Reading, column: Any, rows: NDArray[np.int64]
) -> tuple[NDArray[np.float32], NDArray[np.int64], dict[int, SequenceError]]:
    arrays, problems, name = [], {}, reading.name(SEQUENCE)
    for index, (cell, row) in enumerate(zip(column, rows.tolist(), strict=True)):
        try:
            text = cell.as_py()
            if text is None:
                raise reading.fail(f"null, {_LISTS} expected", row, name)
            arrays.append(reading.check(as_array(reading, json.loads(text), row, name), row, name))
        except SequenceError as error:
            problems[index] = error
        except (ValueError, RecursionError):
            problems[index] = reading.fail(f"{_LISTS} in JSON expected, got {cell.as_py()!r:.60}", row, name)
    lengths = np.array([len(array) for array in arrays], np.int64)
    return np.concatenate(arrays or [np.empty((0, 1), np.float32)]), lengths, problems


def is_text(kind: Any) -> bool:
    """True if cells of Arrow's type `kind` are strings."""
    if pa.types.is_dictionary(kind):
        return is_text(kind.value_type)
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _one(column: Any) -> Any:
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column


def _is_sequence(kind: Any) -> bool:
    if isinstance(kind, pa.FixedShapeTensorType):
        return len(kind.shape) in (1, 2) and _is_value(kind.value_type)
    if not _is_list(kind):
        return False
    inner = kind.value_type
    return _is_value(inner.value_type if _is_list(inner) else inner)


def _is_value(kind: Any) -> bool:
    return bool(pa.types.is_floating(kind) or pa.types.is_integer(kind) or pa.types.is_decimal(kind))


def _is_list(kind: Any) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _ragged(reading: Reading, column: Any) -> tuple[NDArray[np.float32], NDArray[np.int64]] | dict[int, str]:
    """Converts a column of sequences; returns the problems by index if there are any."""
    if column.null_count:
        return dict.fromkeys(_where(column.is_null()), f"null, {_LISTS} expected")
    if not len(column):
        return np.empty((0, 1), np.float32), np.empty(0, np.int64)
    if isinstance(column.type, pa.FixedShapeTensorType):
        tensors = column.to_numpy_ndarray()
        shape = tensors.shape[1:]
        flat = tensors.reshape(-1)
        lengths = np.full(len(column), shape[0], np.int64)
        width = shape[1] if len(shape) == 2 else 1
        if width != reading.width(width):
            return dict.fromkeys(range(len(column)), reading.describe_width(width))
    else:
        steps, lengths = _unnest(column)
        if not lengths.all():
            return dict.fromkeys(np.flatnonzero(lengths == 0).tolist(), "an empty sequence")
        found = _numbers_of(reading, steps, lengths)
        if isinstance(found, dict):
            return found
        flat, width = found
    values = to_float32(flat)
    bad = non_finite(values)
    if bad.size:
        problems: dict[int, str] = {}
        for at in bad.tolist():
            step, feature = divmod(at, width)
            index, step = _place(lengths, step)
            problems.setdefault(index, describe_non_finite(float(flat[at]), f"[{step}][{feature}]"))
        return problems
    return values.reshape(-1, width), lengths


def _numbers_of(
    reading: Reading, steps: Any, lengths: NDArray[np.int64]
) -> tuple[NDArray[np.generic], int] | dict[int, str]:
    """Returns the numbers of timesteps and their width; or the problems by sequence."""
    flat = not _is_list(steps.type)
    if steps.null_count:
        what = "a number expected" if flat else "a list of numbers expected"
        places = [_place(lengths, at) for at in _where(steps.is_null())]
        return {index: f"[{step}] is null, {what}" for index, step in reversed(places)}
    cells, widths = (steps, np.ones(len(steps), np.int64)) if flat else _unnest(steps)
    width = reading.width(int(widths[0]))
    other = np.flatnonzero(widths != width)
    if other.size:
        problems: dict[int, str] = {}
        for at in other.tolist():
            index, step = _place(lengths, at)
            problems.setdefault(index, reading.describe_width(int(widths[at]), step))
        return problems
    if cells.null_count:
        empty = [(*_place(lengths, at // width), at % width) for at in _where(cells.is_null())]
        return {index: f"[{step}][{feature}] is null, a number expected" for index, step, feature in reversed(empty)}
    if pa.types.is_decimal(cells.type):
        cells = cells.cast(pa.float64())
    return cells.to_numpy(zero_copy_only=False), width


def _place(lengths: NDArray[np.int64], step: int) -> tuple[int, int]:
    """Returns the sequence of a step of all, and the step within it."""
    ends = np.cumsum(lengths)
    index = int(np.searchsorted(ends, step, side="right"))
    return index, step - int(ends[index] - lengths[index])


def _unnest(lists: Any) -> tuple[Any, NDArray[np.int64]]:
    """Removes one level of lists: returns the concatenated items and the length of each list. No list is null."""
    if pa.types.is_fixed_size_list(lists.type):
        return lists.flatten(), np.full(len(lists), lists.type.list_size, np.int64)
    offsets: NDArray[Any] = lists.offsets.to_numpy()
    first, last = int(offsets[0]), int(offsets[-1])
    return lists.values.slice(first, last - first), np.diff(offsets).astype(np.int64)


def _where(mask: Any) -> list[int]:
    return list(np.flatnonzero(mask.to_numpy(zero_copy_only=False)).tolist())
