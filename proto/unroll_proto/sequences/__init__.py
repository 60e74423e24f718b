"""Sequence files: Parquet, JSON Lines, npz and .ts, read by sequences or blocks of them and checked on the way.

Parquet and JSON Lines have the columns `sequence` (a list of timesteps, each a list of numbers), and optionally
`label` (string or integer), `split` ("train", "validation" or "test") and `id` (string or integer). An npz has the
arrays `values` [total steps, features] and `lengths`, and optionally `labels`, `splits` and `ids`. A .ts file is
the text format of the UCR and UEA archives. A missing or null label, split or id is not an error: the label and the
split are then None, and the id is the sequence's index. Labels and ids have at most 1024 bytes in UTF-8 and no NUL, so
that every format can hold them.

Parquet needs pyarrow, which is imported when a Parquet file is read or written.
"""

from unroll_proto.sequences.reading import ARROW_MISSING, SUFFIXES, count_sequences, read_blocks, read_sequences
from unroll_proto.sequences.types import SPLITS, Block, Sequence, SequenceError
from unroll_proto.sequences.writing import write_sequences

__all__ = [
    "ARROW_MISSING",
    "SPLITS",
    "SUFFIXES",
    "Block",
    "Sequence",
    "SequenceError",
    "count_sequences",
    "read_blocks",
    "read_sequences",
    "write_sequences",
]
