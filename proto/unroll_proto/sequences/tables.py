"""Layouts of tables: a row for each sequence, with lists or with a column for each step; or a row for each timestep."""

from collections.abc import Iterator

from unroll_proto.sequences.arrow import Table
from unroll_proto.sequences.checks import ID, LABEL, SEQUENCE, SPLIT, TIME, Reading
from unroll_proto.sequences.columns import missing
from unroll_proto.sequences.sequence_rows import nested_blocks, wide_blocks
from unroll_proto.sequences.timestep_rows import timestep_blocks
from unroll_proto.sequences.types import Block


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
            raise missing(reading, name, names)
    if not names:
        return
    columns = reading.columns
    whole = reading.name(SEQUENCE) in names
    if whole and not columns.features and not columns.time:
        yield from nested_blocks(table, reading)
    elif columns.time or reading.name(TIME) in names or (columns.features and set(columns.features) <= set(names)):
        yield from timestep_blocks(table, reading)
    else:
        yield from wide_blocks(table, reading)
