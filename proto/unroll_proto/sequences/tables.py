"""Layouts of tables: a row for each sequence, with lists or with a column for each step; or a row for each timestep."""

import re
from collections import OrderedDict
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from unroll_proto.sequences.arrow import Batch, Table
from unroll_proto.sequences.cells import is_number, nested, numbers, strings
from unroll_proto.sequences.checks import (
    ID,
    LABEL,
    SEQUENCE,
    SPLIT,
    TIME,
    Reading,
    check_split,
    describe_non_finite,
    non_finite,
    to_float32,
)
from unroll_proto.sequences.npz import unpadded
from unroll_proto.sequences.types import Block, SequenceError

# Columns of the table's index, which pandas writes.
_INDEX = re.compile(r"__index_level_\d+__|Unnamed: \d+|")
_STEP = re.compile(r"(.*?)[_.\-]?(\d+)")
_LONG_ROWS = 1 << 16
# Ids of the last sequences of a long table that are remembered, to notice one that comes again.
_REMEMBERED = 1 << 16


def read_table(table: Table, reading: Reading) -> Iterator[Block]:
    """Reads the sequences of a table, in the layout that its columns show.

    Raises:
        SequenceError: the columns have no layout that is known, or one that was asked for is missing.
    """
    names = list(table.schema.names)
    for role in (SEQUENCE, ID, TIME, LABEL, SPLIT):
        name = reading.name(role)
        if names.count(name) > 1:
            raise reading.fail(f"there are {names.count(name)} of it", column=name)
        if getattr(reading.columns, role, None) and name not in names and name not in reading.source.partitions:
            raise _missing(reading, name, names)
    if not names:
        return
    columns = reading.columns
    whole = reading.name(SEQUENCE) in names
    if whole and not columns.features and not columns.time:
        yield from _nested_blocks(table, reading)
    elif columns.time or reading.name(TIME) in names or (columns.features and set(columns.features) <= set(names)):
        yield from _long_blocks(table, reading, _long_features(table, reading))
    else:
        yield from _wide_blocks(table, reading, _wide_features(table, reading))


def _missing(reading: Reading, name: str, names: list[str]) -> SequenceError:
    return reading.fail(f"missing; the columns are {names!r:.200}", column=name)


def _left(table: Table, reading: Reading) -> list[str]:
    """Returns the names of the columns that have no role."""
    roles = {reading.name(role) for role in (SEQUENCE, ID, TIME, LABEL, SPLIT)}
    return [name for name in table.schema.names if name not in roles and not _INDEX.fullmatch(name)]


def _present(table: Table, reading: Reading, *roles: str) -> list[str]:
    return [reading.name(role) for role in roles if reading.name(role) in table.schema.names]


def _nested_blocks(table: Table, reading: Reading) -> Iterator[Block]:
    columns = _present(table, reading, SEQUENCE, ID, LABEL, SPLIT)
    most = int(max(min(reading.sequences, reading.values // table.row_values(columns[:1])), 1))
    for batch in table.read(columns, reading.skip, most):
        values, lengths, problems = nested(reading, batch.columns.column(reading.name(SEQUENCE)), batch.rows)
        yield from _rows(table, reading, batch, values, lengths, problems, ())


def _wide_features(table: Table, reading: Reading) -> list[tuple[str, list[str]]]:
    """Returns each feature and its columns, one for each step."""
    left = _left(table, reading)
    groups: dict[str, dict[int, str]] = {}
    others = []
    for name in left:
        place = _STEP.fullmatch(name)
        if place:
            groups.setdefault(place[1], {})[int(place[2])] = name
        else:
            others.append(name)
    wanted = reading.columns.features
    for name in wanted:
        if name not in groups:
            raise _missing(reading, name, table.schema.names)
    if not groups or (others and not wanted):
        what = (
            f"no column '{reading.name(SEQUENCE)}' and no column '{reading.name(TIME)}', and {others!r:.200} are not"
            " steps such as x_0, x_1: name the columns by --sequence-column, --time or --features"
        )
        raise reading.fail(what)
    known = reading.expected.names if reading.expected and set(reading.expected.names) <= set(groups) else ()
    chosen = wanted or known or tuple(groups)
    steps = sorted(groups[chosen[0]])
    for name in chosen:
        if sorted(groups[name]) != steps:
            raise reading.fail(f"{len(groups[name])} steps, {len(steps)} expected as of '{chosen[0]}'", column=name)
    return [(name, [groups[name][step] for step in steps]) for name in chosen]


def _wide_blocks(table: Table, reading: Reading, features: list[tuple[str, list[str]]]) -> Iterator[Block]:
    names = tuple(name for name, _ in features)
    cells = [name for _, steps in features for name in steps]
    columns = [*_present(table, reading, ID, LABEL, SPLIT), *cells]
    most = max(min(reading.sequences, reading.values // len(cells)), 1)
    for batch in table.read(columns, reading.skip, most):
        problems: dict[int, SequenceError] = {}
        matrix = np.empty((len(batch.rows), len(features[0][1]), len(features)), np.float64)
        for feature, (_, steps) in enumerate(features):
            for step, name in enumerate(steps):
                matrix[:, step, feature] = numbers(reading, batch.columns.column(name), batch.rows, name, problems)
        lengths = unpadded(matrix)
        inside = np.arange(matrix.shape[1]) < lengths[:, None]
        converted = to_float32(matrix)
        bad = ~np.isfinite(converted).all(axis=2) & inside
        for index in np.flatnonzero(bad.any(axis=1) | (lengths == 0)).tolist():
            if lengths[index] == 0:
                problems.setdefault(index, reading.fail("an empty sequence", int(batch.rows[index])))
                continue
            step = int(bad[index].argmax())
            feature = int((~np.isfinite(converted[index, step])).argmax())
            column = features[feature][1][step]
            what = _describe_cell(float(matrix[index, step, feature]))
            problems.setdefault(index, reading.fail(what, int(batch.rows[index]), column))
        if reading.width(len(features)) != len(features):
            what = reading.describe_width(len(features))
            problems = {index: reading.fail(what, int(row)) for index, row in enumerate(batch.rows)}
        keep = np.ones(len(lengths), np.bool_)
        keep[list(problems)] = False
        values = converted[inside & keep[:, None]]
        yield from _rows(table, reading, batch, values, lengths[keep], problems, names if names != ("",) else ())


def _describe_cell(value: float) -> str:
    return "no number, but later steps have one" if np.isnan(value) else describe_non_finite(value)


def _rows(
    table: Table,
    reading: Reading,
    batch: Batch,
    values: NDArray[np.float32],
    lengths: NDArray[np.int64],
    problems: dict[int, SequenceError],
    features: tuple[str, ...],
) -> Iterator[Block]:
    """Makes blocks of rows that are sequences; values and lengths are those of the rows without a problem."""
    kept = [index for index in range(len(batch.rows)) if index not in problems]
    others: dict[int, SequenceError] = {}
    ids, labels, splits = _names(reading, batch, others)
    rows = batch.rows[kept].tolist()
    block = Block(
        values,
        lengths,
        _filled(reading, [ids[index] for index in kept], rows, table.first_row),
        [labels[index] for index in kept],
        [splits[index] for index in kept],
        rows,
        sorted([*problems.values(), *batch.invalid], key=lambda error: error.place),
        features,
    )
    if others:
        place = {index: at for at, index in enumerate(kept)}
        block = block.without({place[index]: error for index, error in others.items() if index in place})
    first = table.first_row + reading.skip
    if (rows and rows[0] < first) or any(error.place < first for error in block.refused):
        # Formats that can't leave out rows unread.
        block = _after(block, first)
    if block.taken:
        yield from block.parts(reading.sequences, reading.values)


def _filled(reading: Reading, ids: list[str | None], rows: list[int], first: int) -> list[str]:
    """Gives ids to the sequences without one."""
    pairs = zip(ids, rows, strict=True)
    return [reading.default_id(row - first) if name is None else name for name, row in pairs]


def _after(block: Block, first: int) -> Block:
    kept = [sequence for sequence in block if sequence.row >= first]
    made = Block.of(kept, [error for error in block.refused if error.place >= first])
    return Block(made.values, made.lengths, made.ids, made.labels, made.splits, made.rows, made.refused, block.features)


def _names(
    reading: Reading, batch: Batch, problems: dict[int, SequenceError]
) -> tuple[list[str | None], list[str | None], list[str | None]]:
    """Returns ids, labels and splits of a batch; those of partitions if there is no such column."""
    found = []
    for role in (ID, LABEL, SPLIT):
        name = reading.name(role)
        if name in batch.columns.schema.names:
            found.append(strings(reading, batch.columns.column(name), batch.rows, name, problems))
        else:
            found.append([reading.source.partitions.get(name)] * len(batch.rows))
    for index, split in enumerate(found[2]):
        if split is not None and index not in problems:
            try:
                check_split(reading.source.name, split, int(batch.rows[index]), reading.name(SPLIT))
            except SequenceError as error:
                problems[index] = error
    return found[0], found[1], found[2]


def _long_features(table: Table, reading: Reading) -> tuple[str, ...]:
    wanted = reading.columns.features
    for name in wanted:
        if name not in table.schema.names:
            raise _missing(reading, name, table.schema.names)
    left = _left(table, reading)
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


def _long_blocks(table: Table, reading: Reading, features: tuple[str, ...]) -> Iterator[Block]:
    """Reads a table with a row for each timestep, in which the rows of a sequence follow each other."""
    columns = [*_present(table, reading, ID, TIME, LABEL, SPLIT), *features]
    seen: OrderedDict[str | None, None] = OrderedDict()
    index = 0
    for batch in _whole_sequences(table.read(columns, 0, _LONG_ROWS), reading):
        block = _long_block(batch, reading, features, index, seen)
        taken, skip = block.taken, max(reading.skip - index, 0)
        index += taken
        if skip < taken:
            if skip:
                places = sorted([*block.rows, *(error.place for error in block.refused)])
                block = _after(block, places[skip])
            yield from block.parts(reading.sequences, reading.values)


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


def _long_block(
    batch: Batch, reading: Reading, features: tuple[str, ...], first: int, seen: "OrderedDict[str | None, None]"
) -> Block:
    """Makes a block of whole sequences; a problem of any of its timesteps is one of the sequence."""
    problems: dict[int, SequenceError] = {}  # by timestep
    ids, labels, splits = _names(reading, batch, problems)
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
