"""Reading a sequence file of any format, chosen by its suffix."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Final, TypeVar

from unroll_proto.sequences.jsonl import read_jsonl
from unroll_proto.sequences.npz import count_npz, read_npz
from unroll_proto.sequences.ts import read_ts
from unroll_proto.sequences.types import Block, Sequence, SequenceError

ARROW_MISSING: Final = "Parquet needs pyarrow: pip install 'unroll-client[files]'"


def parquet_of(path: Path) -> ModuleType:
    """Imports `unroll_proto.sequences.parquet`, for the file `path`.

    Raises:
        SequenceError: pyarrow is not installed.
    """
    try:
        from unroll_proto.sequences import parquet
    except ModuleNotFoundError:
        raise SequenceError(path, ARROW_MISSING) from None
    return parquet


def _parquet_blocks(path: Path) -> Iterator[Block]:
    yield from parquet_of(path).read_parquet(path)


def _read_parquet(path: Path) -> Iterator[Sequence]:
    for block in _parquet_blocks(path):
        yield from block


def _count_parquet(path: Path) -> int:
    return int(parquet_of(path).count_parquet(path))


_READERS: Final[dict[str, Callable[[Path], Iterator[Sequence]]]] = {
    ".parquet": _read_parquet,
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".npz": read_npz,
    ".ts": read_ts,
}
# Formats that are read block by block.
_BLOCK_READERS: Final[dict[str, Callable[[Path], Iterator[Block]]]] = {".parquet": _parquet_blocks}
_COUNTERS: Final[dict[str, Callable[[Path], int]]] = {".parquet": _count_parquet, ".npz": count_npz}

SUFFIXES: Final = tuple(_READERS)

T = TypeVar("T")


def read_sequences(path: Path) -> Iterator[Sequence]:
    """Reads a file's sequences one by one, in order.

    Memory doesn't grow with the file, except for npz, whose arrays are loaded.

    Args:
        path: A .parquet, .jsonl, .ndjson, .npz or .ts file.

    Yields:
        Checked sequences with the same number of features; none if the file is empty.

    Raises:
        SequenceError: the file or a sequence can't be used; raised when the reading gets there.
    """
    reader = _for_suffix(path, _READERS)
    assert reader is not None
    try:
        yield from reader(path)
    except OSError as error:
        raise SequenceError(path, _reason(error)) from None


def read_blocks(path: Path, sequences: int, values: int) -> Iterator[Block]:
    """Reads a file's sequences in blocks, in order; Parquet without a Python object for each.

    Args:
        path: See `read_sequences`.
        sequences: Most sequences of a block.
        values: Most numbers of a block; a longer sequence is a block of its own.

    Yields:
        Blocks of at least one sequence.

    Raises:
        SequenceError: see `read_sequences`.
    """
    reader = _for_suffix(path, _BLOCK_READERS, known=SUFFIXES)
    if reader is None:
        yield from _gathered(read_sequences(path), sequences, values)
        return
    try:
        for block in reader(path):
            yield from block.parts(sequences, values)
    except OSError as error:
        raise SequenceError(path, _reason(error)) from None


def _gathered(source: Iterator[Sequence], sequences: int, values: int) -> Iterator[Block]:
    held: list[Sequence] = []
    size = 0
    for sequence in source:
        if held and (len(held) == sequences or size + sequence.values.size > values):
            yield Block.of(held)
            held, size = [], 0
        held.append(sequence)
        size += sequence.values.size
    if held:
        yield Block.of(held)


def count_sequences(path: Path) -> int | None:
    """Counts a file's sequences from the metadata of Parquet and npz; returns None for other formats.

    Raises:
        SequenceError: the file can't be read.
    """
    _for_suffix(path, _READERS)
    counter = _for_suffix(path, _COUNTERS, known=SUFFIXES)
    try:
        return None if counter is None else counter(path)
    except OSError as error:
        raise SequenceError(path, _reason(error)) from None


def _for_suffix(path: Path, by_suffix: dict[str, T], known: tuple[str, ...] = ()) -> T | None:
    suffix = path.suffix.lower()
    if suffix not in by_suffix and suffix not in known:
        *most, last = SUFFIXES
        raise SequenceError(path, f"a file of kind {', '.join(most)} or {last} expected")
    return by_suffix.get(suffix)


def _reason(error: OSError) -> str:
    return os.strerror(error.errno).lower() if error.errno else str(error)
