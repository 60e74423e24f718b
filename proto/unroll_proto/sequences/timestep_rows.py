"""Tables with a row for each timestep, in which the rows of a sequence follow each other."""

from collections import OrderedDict
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from unroll_proto.sequences.arrow import Batch, Table
from unroll_proto.sequences.cells import is_number, numbers
from unroll_proto.sequences.checks import (
    ID,
    LABEL,
    SPLIT,
    TIME,
    Reading,
    describe_non_finite,
    non_finite,
    to_float32,
)
from unroll_proto.sequences.columns import missing, names_of, present, unassigned
from unroll_proto.sequences.types import Block, SequenceError

_ROWS = 1 << 16
# Ids of the last sequences that are remembered, to notice one that comes again.
_REMEMBERED = 1 << 16


def timestep_blocks(table: Table, reading: Reading) -> Iterator[Block]:
    """Reads timesteps; a sequence is held in memory as a whole.

    Raises:
        SequenceError: there are no columns of features, or one is of another kind.
    """
    features = _features(table, reading)
    columns = [*present(table, reading, ID, TIME, LABEL, SPLIT), *features]
    seen: OrderedDict[str | None, None] = OrderedDict()
    index = 0
    for batch in _whole_sequences(table.read(columns, 0, _ROWS), reading):
        block = _block(batch, reading, features, index, seen)
        taken, skip = block.taken, max(reading.skip - index, 0)
        index += taken
        if skip < taken:
            if skip:
                places = sorted([*block.rows, *(error.place for error in block.refused)])
                block = block.after(places[skip])
            yield from block.parts(reading.sequences, reading.values)


def _features(table: Table, reading: Reading) -> tuple[str, ...]:
    wanted = reading.columns.features
    for name in wanted:
        if name not in table.schema.names:
            raise missing(reading, name, table.schema.names)
    left = unassigned(table, reading)
    if wanted:
        return wanted
    if reading.expected and set(reading.expected.names) <= set(left):
        return reading.expected.names
    for name in left:
        kind = table.schema.field(name).type
        if not (is_number(kind) or pa.types.is_string(kind) or pa.types.is_null(kind)):
            raise reading.fail(f"numbers expected, got {kind}; name the features by --features", column=name)
    if not left:
        raise reading.fail(f"no columns of features; the columns are {table.schema.names!r:.200}")
    return tuple(left)


def _whole_sequences(batches: Iterator[Batch], reading: Reading) -> Iterator[Batch]:
    """Cuts batches of timesteps between sequences."""
    name = reading.name(ID)
    held: list[Batch] = []
    for batch in batches:
        cut = 0
        if name in batch.columns.schema.names and len(batch.rows):
            column = batch.columns.column(name)
            before = column.slice(0, len(column) - 1)
            changes = np.flatnonzero(
                pc.not_equal(column.slice(1), before).fill_null(True).to_numpy(zero_copy_only=False)
            )
            cut = int(changes[-1]) + 1 if changes.size else 0
            if held and held[-1].columns.column(name)[-1] != column[0] and not cut:
                yield _joined(held)
                held = []
        if cut:
            invalid = [error for error in batch.invalid if error.place < batch.rows[cut]]
            yield _joined([*held, Batch(batch.columns.slice(0, cut), batch.rows[:cut], invalid)])
            held = []
            batch = Batch(batch.columns.slice(cut), batch.rows[cut:], batch.invalid[len(invalid) :])
        held.append(batch)
    if held:
        yield _joined(held)


def _joined(batches: list[Batch]) -> Batch:
    tables = [batch.columns if isinstance(batch.columns, pa.Table) else pa.table(batch.columns) for batch in batches]
    table = pa.concat_tables(tables, promote_options="permissive").combine_chunks()
    rows = np.concatenate([batch.rows for batch in batches])
    return Batch(table, rows, [error for batch in batches for error in batch.invalid])


def _block(
    batch: Batch, reading: Reading, features: tuple[str, ...], first: int, seen: "OrderedDict[str | None, None]"
) -> Block:
    """Makes a block of whole sequences; a problem of any of its timesteps is one of the sequence."""
    problems: dict[int, SequenceError] = {}  # by timestep
    ids, labels, splits = names_of(reading, batch, problems)
    matrix = np.empty((len(ids), len(features)), np.float64)
    for feature, name in enumerate(features):
        matrix[:, feature] = numbers(reading, batch.columns.column(name), batch.rows, name, problems)
    starts = [at for at in range(len(ids)) if at == 0 or ids[at] != ids[at - 1]]
    ends = [*starts[1:], len(ids)]
    order = _in_time(batch, reading, np.repeat(np.arange(len(starts)), np.subtract(ends, starts)), problems)
    converted = to_float32(matrix[order])
    for bad in non_finite(converted).tolist():
        at = int(order[bad // len(features)])
        column = features[bad % len(features)]
        value = float(matrix[at, bad % len(features)])
        what = "no number" if np.isnan(value) else describe_non_finite(value)
        problems.setdefault(at, reading.fail(what, int(batch.rows[at]), column))
    width = reading.width(len(features))
    of_sequences: dict[int, SequenceError] = {}
    for error in batch.invalid:
        run = int(np.searchsorted(batch.rows[starts], error.place, side="right")) - 1
        of_sequences.setdefault(max(run, 0), error)
    for at in sorted(problems):
        of_sequences.setdefault(int(np.searchsorted(starts, at, side="right")) - 1, problems[at])
    for run, (start, end) in enumerate(zip(starts, ends, strict=True)):
        row = int(batch.rows[start])
        if ids[start] in seen and ids[start] is not None:
            what = f"{ids[start]!r:.60} comes again after other ids; sort the file by it"
            of_sequences.setdefault(run, reading.fail(what, row, reading.name(ID)))
        seen[ids[start]] = None
        if len(seen) > _REMEMBERED:
            seen.popitem(last=False)
        if width != len(features):
            of_sequences[run] = reading.fail(reading.describe_width(len(features)), row)
        for column, role in ((labels, LABEL), (splits, SPLIT)):
            if any(value != column[start] for value in column[start:end]):
                what = f"differs within the sequence {ids[start]!r:.60}"
                of_sequences.setdefault(run, reading.fail(what, row, reading.name(role)))
    kept = [run for run in range(len(starts)) if run not in of_sequences]
    mask = np.zeros(len(ids), np.bool_)
    for run in kept:
        mask[starts[run] : ends[run]] = True
    return Block(
        converted[mask],
        np.array([ends[run] - starts[run] for run in kept], np.int64),
        [reading.default_id(first + run) if ids[starts[run]] is None else str(ids[starts[run]]) for run in kept],
        [labels[starts[run]] for run in kept],
        [splits[starts[run]] for run in kept],
        batch.rows[[starts[run] for run in kept]].tolist() if kept else [],
        [of_sequences[run] for run in sorted(of_sequences)],
        features,
    )


def _in_time(
    batch: Batch, reading: Reading, runs: NDArray[np.int64], problems: dict[int, SequenceError]
) -> NDArray[np.int64]:
    """Returns the order of the timesteps by time within each sequence."""
    name = reading.name(TIME)
    if name not in batch.columns.schema.names:
        return np.arange(len(runs))
    column = batch.columns.column(name)
    kind = column.type
    if pa.types.is_string(kind):
        for target in (pa.float64(), pa.timestamp("us"), pa.timestamp("us", "UTC")):
            try:
                column = column.cast(target)
                break
            except pa.ArrowException:
                continue
        else:
            raise reading.fail("numbers or ISO 8601 times expected", int(batch.rows[0]), name)
    if pa.types.is_temporal(column.type):
        column = column.cast(pa.int64(), safe=False)
    times = numbers(reading, column, batch.rows, name, problems)
    for at in np.flatnonzero(np.isnan(times)).tolist():
        problems.setdefault(at, reading.fail("no time", int(batch.rows[at]), name))
    order = np.lexsort((times, runs))
    ordered = times[order]
    same = np.flatnonzero((ordered[1:] == ordered[:-1]) & (runs[order][1:] == runs[order][:-1]))
    for at in order[same + 1].tolist():
        problems.setdefault(at, reading.fail("the time of another row of the sequence", int(batch.rows[at]), name))
    return order
