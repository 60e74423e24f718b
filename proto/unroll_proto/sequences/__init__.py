"""Sequence files of many formats, read in blocks or one sequence at a time, and checked on the way.

Parquet, Arrow (Feather), CSV, TSV, JSON Lines, npz, npy and .ts; text also compressed by gzip or Zstandard.
docs/data.md describes each. Labels and ids have at most 1024 bytes in UTF-8 and no NUL, so that every format can hold
them.

Tables and Zstandard need pyarrow, URLs fsspec. Both are imported when they are needed.
"""

from unroll_proto.sequences.files import ARROW_MISSING, STDIN, Source, find_sources
from unroll_proto.sequences.reading import SUFFIXES, USUAL, count_sequences, read_blocks, read_sequences
from unroll_proto.sequences.types import (
    SPLITS,
    Block,
    Columns,
    Expected,
    Sequence,
    SequenceError,
    UnreadableError,
)
from unroll_proto.sequences.writing import write_sequences

__all__ = [
    "ARROW_MISSING",
    "SPLITS",
    "STDIN",
    "SUFFIXES",
    "USUAL",
    "Block",
    "Columns",
    "Expected",
    "Sequence",
    "SequenceError",
    "Source",
    "UnreadableError",
    "count_sequences",
    "find_sources",
    "read_blocks",
    "read_sequences",
    "write_sequences",
]
