"""Parquet: reads batches of rows by column, through Arrow's buffers, into numpy; writes row groups.

The only file of the package that imports pyarrow.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from unroll_proto.sequences.checks import (
    ID,
    LABEL,
    SEQUENCE,
    SPLIT,
    SequenceChecks,
    check_name,
    check_split,
    describe_non_finite,
    first_non_finite,
    to_float32,
)
from unroll_proto.sequences.types import Block, Sequence, SequenceError

# Numbers decoded at a time: 8 MiB as float64, for row groups of any size.
BATCH_VALUES = 1 << 20
MAX_BATCH_ROWS = 16384
# Most numbers of a written row group: it is held in memory, and Arrow counts them in 32 bits.
GROUP_ROWS = 4096
GROUP_VALUES = 1 << 24


def read_parquet(path: Path) -> Iterator[Block]:
    """Reads the known columns only, in blocks of some 8 MiB."""
    checks = SequenceChecks(path)
    row = 1
    try:
        # Without a buffer size, a whole column of a row group is held in memory.
        with pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as file:
            columns = _columns(path, file.schema_arrow)
            for batch in file.iter_batches(_batch_rows(file), columns=columns):
                if batch.num_rows:
                    yield _block(path, batch, checks, row)
                row += batch.num_rows
    # Arrow doesn't check that a column's name is UTF-8.
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise SequenceError(path, f"not readable Parquet: {error}") from None


def count_parquet(path: Path) -> int:
    """Counts the rows from the file's metadata."""
    try:
        return int(pq.read_metadata(path).num_rows)
    except pa.ArrowException as error:
        raise SequenceError(path, f"not readable Parquet: {error}") from None


def write_parquet(file: IO[bytes], sequences: Iterable[Sequence]) -> None:
    """Writes row groups of at most GROUP_ROWS sequences."""
    text = pa.string()
    nested = pa.list_(pa.list_(pa.float32()))
    schema = pa.schema([("id", text), ("sequence", nested), ("label", text), ("split", text)])
    with pq.ParquetWriter(file, schema) as writer:
        for group in _groups(sequences):
            steps = [len(sequence.values) for sequence in group]
            values = np.concatenate([sequence.values for sequence in group])
            starts = np.arange(len(values) + 1, dtype=np.int32) * np.int32(values.shape[1])
            inner = pa.ListArray.from_arrays(pa.array(starts), pa.array(values.reshape(-1)))
            outer = pa.ListArray.from_arrays(pa.array(np.cumsum([0, *steps]), pa.int32()), inner)
            columns = [
                pa.array([sequence.id for sequence in group], text),
                outer,
                pa.array([sequence.label for sequence in group], text),
                pa.array([sequence.split for sequence in group], text),
            ]
            writer.write_batch(pa.record_batch(columns, schema=schema))


def _groups(sequences: Iterable[Sequence]) -> Iterator[list[Sequence]]:
    """Yields groups of at most GROUP_ROWS sequences and GROUP_VALUES numbers; a larger sequence is a group itself."""
    group: list[Sequence] = []
    values = 0
    for sequence in sequences:
        if len(group) == GROUP_ROWS or (group and values + sequence.values.size > GROUP_VALUES):
            yield group
            group, values = [], 0
        group.append(sequence)
        values += sequence.values.size
    if group:
        yield group


def _columns(path: Path, schema: pa.Schema) -> list[str]:
    """Checks the types of the columns and returns the names of those to read."""
    found = []
    for name in (SEQUENCE, LABEL, SPLIT, ID):
        fields = schema.get_all_field_indices(name)
        if len(fields) > 1:
            raise SequenceError(path, f"there are {len(fields)} of it", column=name)
        if not fields:
            continue
        kind = schema.field(name).type
        if name == SEQUENCE and not _is_sequence(kind):
            raise SequenceError(path, f"a list of lists of numbers expected, got {kind}", column=name)
        if name == SPLIT and not (_is_text(kind) or pa.types.is_null(kind)):
            raise SequenceError(path, f"strings expected, got {kind}", column=name)
        if name in (LABEL, ID) and not (_is_text(kind) or pa.types.is_integer(kind) or pa.types.is_null(kind)):
            raise SequenceError(path, f"strings or integers expected, got {kind}", column=name)
        found.append(name)
    if SEQUENCE not in found:
        raise SequenceError(path, f"missing; the columns are {schema.names!r:.200}", column=SEQUENCE)
    return found


def _is_sequence(kind: pa.DataType) -> bool:
    if not (_is_list(kind) and _is_list(kind.value_type)):
        return False
    number = kind.value_type.value_type
    return bool(pa.types.is_floating(number) or pa.types.is_integer(number))


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        return _is_text(kind.value_type)
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _batch_rows(file: pq.ParquetFile) -> int:
    """Returns the rows to decode at a time, from the row group with the longest rows."""
    rows = MAX_BATCH_ROWS
    for index in range(file.metadata.num_row_groups):
        group = file.metadata.row_group(index)
        for position in range(group.num_columns):
            column = group.column(position)
            if column.path_in_schema.split(".")[0] == SEQUENCE and column.num_values:
                rows = min(rows, BATCH_VALUES * group.num_rows // column.num_values)
    return max(rows, 1)


def _block(path: Path, batch: pa.RecordBatch, checks: SequenceChecks, first_row: int) -> Block:
    values, lengths = _ragged(batch.column(SEQUENCE), checks, first_row)
    names = {name: _strings(path, batch, name, first_row) for name in (ID, LABEL, SPLIT)}
    if None in names[ID]:
        names[ID] = [str(row) if name is None else name for row, name in enumerate(names[ID], first_row - 1)]
    rows = range(first_row, first_row + len(lengths))
    return Block(values, lengths, cast("list[str]", names[ID]), names[LABEL], names[SPLIT], rows)


def _strings(path: Path, batch: pa.RecordBatch, name: str, first_row: int) -> list[str | None]:
    if name not in batch.schema.names:
        return [None] * batch.num_rows
    column = batch.column(name).cast(pa.string())
    try:
        strings: list[str | None] = column.to_pylist()
    except UnicodeDecodeError:  # Arrow doesn't check a file's strings when it reads them.
        row = first_row + next(index for index, scalar in enumerate(column) if not _is_utf8(scalar))
        raise SequenceError(path, "not UTF-8 text", row=row, column=name) from None
    for row, text in enumerate(strings, first_row):
        check_split(path, text, row) if name == SPLIT else check_name(path, text, row, name)
    return strings


def _is_utf8(text: pa.StringScalar) -> bool:
    try:
        text.as_py()
    except UnicodeDecodeError:
        return False
    return True


def _ragged(column: pa.Array, checks: SequenceChecks, first_row: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Converts a column of sequences to one array [total steps, features] and the lengths [rows], all checked."""
    if column.null_count:
        raise checks.fail("null, a list of lists of numbers expected", first_row + _first(column.is_null()))
    steps, lengths = _unnest(column)
    empty = np.flatnonzero(lengths == 0)
    if empty.size:
        raise checks.fail("an empty sequence", first_row + int(empty[0]))
    ends = np.cumsum(lengths)

    def place(step: int) -> tuple[int, int]:
        """Returns the row of a step of the batch, and the step within the row."""
        row = int(np.searchsorted(ends, step, side="right"))
        return first_row + row, step - int(ends[row] - lengths[row])

    if steps.null_count:
        row, step = place(_first(steps.is_null()))
        raise checks.fail(f"[{step}] is null, a list of numbers expected", row)
    numbers, widths = _unnest(steps)
    if not len(widths):
        return np.empty((0, 0), np.float32), lengths
    checks.features(int(widths[0]), first_row)
    other = np.flatnonzero(widths != widths[0])
    if other.size:
        row, step = place(int(other[0]))
        checks.features(int(widths[other[0]]), row, step)
    width = int(widths[0])
    if numbers.null_count:
        at, feature = divmod(_first(numbers.is_null()), width)
        row, step = place(at)
        raise checks.fail(f"[{step}][{feature}] is null, a number expected", row)
    source = numbers.to_numpy(zero_copy_only=False)
    values = to_float32(source)
    bad = first_non_finite(values)
    if bad is not None:
        at, feature = divmod(bad, width)
        row, step = place(at)
        raise checks.fail(describe_non_finite(float(source[bad]), f"[{step}][{feature}]"), row)
    return values.reshape(-1, width), lengths


def _unnest(lists: pa.Array) -> tuple[pa.Array, NDArray[np.int64]]:
    """Removes one level of lists: returns the concatenated items and the length of each list. No list is null."""
    if pa.types.is_fixed_size_list(lists.type):
        return lists.flatten(), np.full(len(lists), lists.type.list_size, np.int64)
    offsets: NDArray[Any] = lists.offsets.to_numpy()
    first, last = int(offsets[0]), int(offsets[-1])
    return lists.values.slice(first, last - first), np.diff(offsets).astype(np.int64)


def _first(mask: pa.BooleanArray) -> int:
    return int(np.flatnonzero(mask.to_numpy(zero_copy_only=False))[0])
