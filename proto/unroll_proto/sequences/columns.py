"""Columns of tables by their roles: those that are missing or left, and ids, labels and splits."""

import re

from unroll_proto.sequences.arrow import Batch, Table
from unroll_proto.sequences.cells import strings
from unroll_proto.sequences.checks import ID, LABEL, SEQUENCE, SPLIT, TIME, Reading, check_split
from unroll_proto.sequences.types import SequenceError

# Columns of the table's index, which pandas writes.
_INDEX = re.compile(r"__index_level_\d+__|Unnamed: \d+|")


def missing(reading: Reading, name: str, names: list[str]) -> SequenceError:
    """Makes the error of a column that is not among `names`."""
    return reading.fail(f"missing; the columns are {names!r:.200}", column=name)


def unassigned(table: Table, reading: Reading) -> list[str]:
    """Returns the names of the columns that have no role."""
    roles = {reading.name(role) for role in (SEQUENCE, ID, TIME, LABEL, SPLIT)}
    return [name for name in table.schema.names if name not in roles and not _INDEX.fullmatch(name)]


def present(table: Table, reading: Reading, *roles: str) -> list[str]:
    """Returns the names of the columns of roles that the table has."""
    return [reading.name(role) for role in roles if reading.name(role) in table.schema.names]


def names_of(
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
