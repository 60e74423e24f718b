"""Tables as Arrow's record batches: Parquet, Arrow's files and streams, CSV, JSON Lines of timesteps. Writes Parquet.

Imported only where pyarrow is needed.
"""

import csv
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain
from typing import IO, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
from numpy.typing import NDArray

from unroll_proto.sequences.checks import SEQUENCE, Reading
from unroll_proto.sequences.jsonl import numbered, parse
from unroll_proto.sequences.types import Sequence, SequenceError

# Most bytes of CSV that are parsed at a time; the longest line. Arrow holds up to 32 times as many.
_CSV_BYTES = 8 << 20
_JSON_ROWS = 4096
ERRORS = (pa.ArrowException,)
# Most numbers of a written row group: it is held in memory, and Arrow counts them in 32 bits.
GROUP_ROWS = 4096
GROUP_VALUES = 1 << 24


class Batch(NamedTuple):
    """Rows of a table.

    Attributes:
        columns: The rows that can be read.
        rows: int64, the 1-based number of each in the file.
        invalid: Errors of rows between them.
    """

    columns: Any
    rows: NDArray[np.int64]
    invalid: list[SequenceError]


@dataclass(slots=True)
class Table:
    """A table that is read batch by batch.

    Attributes:
        schema: pyarrow's schema.
        read: Yields batches of some columns, without a number of rows at the beginning, of at most so many rows.
        first_row: Number of the first row in the file.
        row_values: Numbers in each row of some columns, on the average; 1 if that is unknown.
    """

    schema: Any
    read: Callable[[list[str], int, int], Iterator[Batch]]
    first_row: int = 1
    row_values: Callable[[list[str]], float] = field(default=lambda columns: 1)


def parquet_table(file: IO[bytes], reading: Reading) -> Table:
    """Opens Parquet; reads row groups one by one, so that memory doesn't grow with the file."""
    # Without a buffer size, a whole column of a row group is held in memory.
    opened = pq.ParquetFile(file, pre_buffer=False, buffer_size=1 << 20)

    def read(columns: list[str], skip: int, most: int) -> Iterator[Batch]:
        row = 1
        for group in range(opened.num_row_groups):
            count = opened.metadata.row_group(group).num_rows
            if row + count <= skip + 1:
                row += count
                continue
            for batch in opened.iter_batches(most, row_groups=[group], columns=columns):
                yield Batch(batch, np.arange(row, row + batch.num_rows), [])
                row += batch.num_rows

    def row_values(columns: list[str]) -> float:
        wanted, most = set(columns), 1.0
        for index in range(opened.num_row_groups):
            group = opened.metadata.row_group(index)
            parts = [group.column(position) for position in range(group.num_columns)]
            total = sum(part.num_values for part in parts if part.path_in_schema.split(".")[0] in wanted)
            most = max(most, total / max(group.num_rows, 1))
        return most

    return Table(opened.schema_arrow, read, 1, row_values)


def count_parquet(file: IO[bytes]) -> int:
    """Counts the rows from the file's metadata."""
    return int(pq.read_metadata(file).num_rows)


def ipc_table(file: IO[bytes], reading: Reading) -> Table:
    """Opens Arrow's file format (Feather) or stream format."""
    head = file.read(6)
    file.seek(0)
    if head.startswith(b"FEA1"):
        raise reading.fail("Feather of version 1, which pandas wrote before 2020; write it again")
    stream = None if head == b"ARROW1" else pa.ipc.open_stream(file)
    opened = pa.ipc.open_file(file) if stream is None else stream
    source = stream or (opened.get_batch(index) for index in range(opened.num_record_batches))

    def read(columns: list[str], skip: int, most: int) -> Iterator[Batch]:
        row = 1
        for batch in source:
            for start in range(0, batch.num_rows, most):
                part = batch.slice(start, most).select(columns)
                yield Batch(part, np.arange(row, row + part.num_rows), [])
                row += part.num_rows

    return Table(opened.schema, read)


def csv_table(file: IO[bytes], reading: Reading, head: bytes) -> Table:
    """Opens CSV with a header or without, whose separator the first line shows; all columns are strings."""
    lines = head.removeprefix(b"\xef\xbb\xbf").splitlines()
    first = next((line for line in lines if line.strip()), b"").decode("utf-8", "replace")
    if not first:
        return Table(pa.schema([]), lambda columns, skip, most: iter(()))
    separator = "\t" if reading.source.kind == ".tsv" else max(",\t;|", key=first.count)
    names = next(csv.reader([first], delimiter=separator))
    headless = all(map(_is_number, names)) and names != [str(index) for index in range(len(names))]
    if headless:
        names = [f"f{index}" for index in range(len(names))]
    # Only lists of timesteps make lines much longer than the first one.
    size = _CSV_BYTES if reading.name(SEQUENCE) in names else min(max(128 * len(first), 1 << 20), _CSV_BYTES)
    invalid: list[SequenceError] = []

    def note(row: Any) -> str:
        what = f"{row.actual_columns} values, {row.expected_columns} expected as in the first row"
        invalid.append(reading.fail(what, row.number))
        return "skip"

    opened = pa_csv.open_csv(
        pa.PythonFile(file, "r"),
        read_options=pa_csv.ReadOptions(use_threads=False, block_size=size, autogenerate_column_names=headless),
        parse_options=pa_csv.ParseOptions(delimiter=separator, newlines_in_values=True, invalid_row_handler=note),
        convert_options=pa_csv.ConvertOptions(
            column_types={name: pa.string() for name in names}, strings_can_be_null=True, null_values=[""]
        ),
    )
    # Columns without a header are named by their numbers.
    columns = [str(index) if headless else name for index, name in enumerate(opened.schema.names)]
    schema = pa.schema([(name, pa.string()) for name in columns])
    first_row = 1 if headless else 2

    def read(columns: list[str], skip: int, most: int) -> Iterator[Batch]:
        row = first_row
        for batch in opened:
            named = batch.rename_columns(schema.names)
            bad = [error.place for error in invalid]
            numbers = np.setdiff1d(np.arange(row, row + batch.num_rows + len(bad)), bad)[: batch.num_rows]
            for start in range(0, batch.num_rows, most):
                own = numbers[start : start + most]
                row = int(own[-1]) + 1
                errors = [error for error in invalid if error.place < row]
                del invalid[: len(errors)]
                yield Batch(named.slice(start, most).select(columns), own, errors)
        if invalid:
            nothing = schema.empty_table().select(columns)
            yield Batch(nothing, np.empty(0, np.int64), invalid)

    return Table(schema, read, first_row)


def json_table(file: IO[bytes], reading: Reading) -> Table:
    """Opens JSON Lines with an object for each row, whose keys are those of the first."""
    lines = numbered(file)
    first = next(lines, None)
    names = list(parse(reading, first[2], first[1])) if first else []

    def read(columns: list[str], skip: int, most: int) -> Iterator[Batch]:
        held: list[dict[str, Any]] = []
        rows: list[int] = []
        invalid: list[SequenceError] = []

        def batch() -> Batch:
            made = {name: _column([record.get(name) for record in held]) for name in columns}
            return Batch(pa.table(made), np.array(rows, np.int64), invalid)

        for _, row, line in chain([first] if first else [], lines):
            try:
                held.append(parse(reading, line, row))
                rows.append(row)
            except SequenceError as error:
                invalid.append(error)
            if len(held) == _JSON_ROWS:
                yield batch()
                held, rows, invalid = [], [], []
        if held or invalid:
            yield batch()

    return Table(pa.schema([(name, pa.null()) for name in names]), read, first[1] if first else 1)


def _column(values: list[Any]) -> Any:
    with suppress(pa.ArrowException):
        return pa.array(values)
    return pa.array([None if value is None else str(value) for value in values], pa.string())


def _is_number(text: str) -> bool:
    return bool(re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?|nan|NaN", text))


def write_parquet(file: IO[bytes], sequences: Iterable[Sequence]) -> None:
    """Writes row groups of at most GROUP_ROWS sequences."""
    text = pa.string()
    nested = pa.list_(pa.list_(pa.float32()))
    schema = pa.schema([("id", text), ("sequence", nested), ("label", text), ("split", text)])
    with pq.ParquetWriter(file, schema, use_dictionary=["label", "split"]) as writer:
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
