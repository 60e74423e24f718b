"""Tables with a row for each sequence, with lists or with a column for each step."""

import re
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from unroll_proto.sequences.arrow import Batch, Table
from unroll_proto.sequences.cells import nested, numbers
from unroll_proto.sequences.checks import ID, LABEL, SEQUENCE, SPLIT, TIME, Reading, describe_non_finite, to_float32
from unroll_proto.sequences.columns import missing, names_of, present, unassigned
from unroll_proto.sequences.npz import unpadded
from unroll_proto.sequences.types import Block, SequenceError

_STEP = re.compile(r"(.*?)[_.\-]?(\d+)")


def nested_blocks(table: Table, reading: Reading) -> Iterator[Block]:
    """Reads lists of timesteps, whole sequences in a cell.

    Raises:
        SequenceError: the column is of another kind.
    """
    columns = present(table, reading, SEQUENCE, ID, LABEL, SPLIT)
    most = int(max(min(reading.sequences, reading.values // table.row_values(columns[:1])), 1))
    for batch in table.read(columns, reading.skip, most):
        values, lengths, problems = nested(reading, batch.columns.column(reading.name(SEQUENCE)), batch.rows)
        yield from _rows(table, reading, batch, values, lengths, problems, ())


def wide_blocks(table: Table, reading: Reading) -> Iterator[Block]:
    """Reads rows with a cell for each step of each feature.

    Raises:
        SequenceError: the columns are not steps of features, or are of another kind.
    """
    features = _wide_features(table, reading)
    names = tuple(name for name, _ in features)
    cells = [name for _, steps in features for name in steps]
    columns = [*present(table, reading, ID, LABEL, SPLIT), *cells]
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


def _wide_features(table: Table, reading: Reading) -> list[tuple[str, list[str]]]:
    """Returns each feature and its columns, one for each step."""
    left = unassigned(table, reading)
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
            raise missing(reading, name, table.schema.names)
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
    ids, labels, splits = names_of(reading, batch, others)
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
        block = block.after(first)
    if block.taken:
        yield from block.parts(reading.sequences, reading.values)


def _filled(reading: Reading, ids: list[str | None], rows: list[int], first: int) -> list[str]:
    """Gives ids to the sequences without one."""
    pairs = zip(ids, rows, strict=True)
    return [reading.default_id(row - first) if name is None else name for name, row in pairs]
