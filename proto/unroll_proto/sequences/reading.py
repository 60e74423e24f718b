"""Reading sequence files of any format, chosen by the name's suffix or else by the first bytes."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import IO, Any, Final

from unroll_proto.sequences.checks import SEQUENCE, TIME, Reading, gather
from unroll_proto.sequences.files import ARROW_MISSING, STDIN, Source, find_sources, opened, readable
from unroll_proto.sequences.jsonl import numbered, parse, read_jsonl
from unroll_proto.sequences.npz import read_npy, read_npz
from unroll_proto.sequences.ts import read_ts
from unroll_proto.sequences.types import Block, Columns, Expected, Sequence, SequenceError

_PARQUET, _ARROW, _CSV, _JSON, _NPZ, _NPY, _TS = "Parquet", "Arrow", "CSV", "JSON Lines", "npz", "npy", "ts"
_KINDS: Final = {
    ".parquet": _PARQUET,
    ".arrow": _ARROW,
    ".feather": _ARROW,
    ".csv": _CSV,
    ".tsv": _CSV,
    ".jsonl": _JSON,
    ".ndjson": _JSON,
    ".npz": _NPZ,
    ".npy": _NPY,
    ".ts": _TS,
}
SUFFIXES: Final = tuple(_KINDS)
_MAGIC: Final = {
    b"PAR1": _PARQUET,
    b"ARROW1": _ARROW,
    b"\xff\xff\xff\xff": _ARROW,
    b"PK": _NPZ,
    b"\x93NUMPY": _NPY,
    b"{": _JSON,
    b"@": _TS,
    b"#": _TS,
}
_ROWS: Final[dict[str, Callable[[IO[bytes], Reading], Iterator[Sequence | SequenceError]]]] = {
    _JSON: read_jsonl,
    _NPZ: read_npz,
    _NPY: read_npy,
    _TS: read_ts,
}
_SEEKABLE = (_PARQUET, _ARROW, _NPZ)

USUAL: Final = Columns()
BLOCK_SEQUENCES = 1024
BLOCK_VALUES = 1 << 19


def read_sequences(
    paths: str | Path | Iterable[str | Path], columns: Columns = USUAL, expected: Expected | None = None
) -> Iterator[Sequence]:
    """Reads sequences one by one, in order.

    Memory doesn't grow with the files, except for the lengths, ids and labels of npz.

    Args:
        paths: Files, folders, globs or URLs; see `find_sources`.
        columns: Names of the columns to read.
        expected: Features that the sequences must have; None for those of a file's first sequence.

    Yields:
        Checked sequences with the same number of features in each file; none if there are no rows.

    Raises:
        SequenceError: a file or a sequence can't be used; raised when the reading gets there.
    """
    for source in find_sources([paths] if isinstance(paths, str | Path) else paths):
        for block in read_blocks(source, BLOCK_SEQUENCES, BLOCK_VALUES, columns, expected):
            yield from block.checked()


def read_blocks(
    source: Source,
    sequences: int,
    values: int,
    columns: Columns = USUAL,
    expected: Expected | None = None,
    skip: int = 0,
) -> Iterator[Block]:
    """Reads a file's sequences in blocks, in order; tables without a Python object for each.

    A block depends on the file, the sizes and `skip` only.

    Args:
        source: The file.
        sequences: Most sequences of a block.
        values: Most numbers of a block; a longer sequence is alone.
        columns: Names of the columns to read.
        expected: Features that the sequences must have; None for those of the first one.
        skip: Sequences at the beginning to leave out, refused ones included.

    Yields:
        Blocks of one sequence or more, or of refused rows.

    Raises:
        SequenceError: the file can't be used, or the rest of it.
    """
    reading = Reading(source, columns, expected, sequences, values, skip)
    with readable(source):
        kind = _kind_of(source)
        with opened(source, lambda head: (kind or _sniffed(head)) in _SEEKABLE) as (file, head):
            yield from _blocks(kind or _sniffed(head), file, head, reading)


def count_sequences(sources: Iterable[Source]) -> int | None:
    """Counts the rows of Parquet files from their metadata; None if others are among them.

    Raises:
        SequenceError: a file can't be read.
    """
    total = 0
    for source in sources:
        if source.filesystem is not None or _kind_of(source) != _PARQUET:
            return None
        with readable(source), opened(source, lambda head: True) as (file, _), _arrow(source, _PARQUET) as (arrow, _):
            total += arrow.count_parquet(file)
    return total


def _kind_of(source: Source) -> str:
    if source.kind and source.kind not in _KINDS and source.name != STDIN:
        *most, last = SUFFIXES
        raise SequenceError(source.name, f"a file of kind {', '.join(most)} or {last} expected, also with .gz or .zst")
    return _KINDS.get(source.kind, "")


def _sniffed(head: bytes) -> str:
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    return next((kind for magic, kind in _MAGIC.items() if start.startswith(magic)), _CSV)


def _blocks(kind: str, file: IO[bytes], head: bytes, reading: Reading) -> Iterator[Block]:
    steps = kind == _JSON and _has_steps(head, reading)
    if kind in _ROWS and not steps:
        yield from gather(reading, _ROWS[kind](file, reading))
        return
    with _arrow(reading.source, kind) as (arrow, tables):
        if kind == _CSV:
            table = arrow.csv_table(file, reading, head)
        else:
            openers = {_PARQUET: arrow.parquet_table, _ARROW: arrow.ipc_table, _JSON: arrow.json_table}
            table = openers[kind](file, reading)
        yield from tables.read_table(table, reading)


def _has_steps(head: bytes, reading: Reading) -> bool:
    """True if each line of JSON Lines is a timestep, or has a key for each."""
    first = next(numbered(BytesIO(head)), None)
    try:
        record = parse(reading, first[2], first[1]) if first else {}
    except SequenceError:
        return False
    columns = reading.columns
    return bool(columns.time or columns.features or (TIME in record and reading.name(SEQUENCE) not in record))


@contextmanager
def _arrow(source: Source, kind: str) -> Iterator[tuple[Any, Any]]:
    """Yields the modules `arrow` and `tables`; turns pyarrow's errors into those of the file.

    Raises:
        SequenceError: pyarrow is not installed, or the file is not of the kind.
    """
    try:
        from unroll_proto.sequences import arrow, tables
    except ModuleNotFoundError:
        raise SequenceError(source.name, ARROW_MISSING.format(kind)) from None
    try:
        yield arrow, tables
    # Arrow doesn't check that a column's name is UTF-8, and raises OSError also for damage.
    except (*arrow.ERRORS, UnicodeDecodeError) as error:
        raise SequenceError(source.name, f"not readable {kind}: {error}") from None
    except OSError as error:
        if error.errno:
            raise
        raise SequenceError(source.name, f"not readable {kind}: {error}") from None
