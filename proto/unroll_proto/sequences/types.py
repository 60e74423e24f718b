"""Results of reading a sequence file: sequences, blocks of them, or an error of one line."""

from collections.abc import Iterator
from collections.abc import Sequence as Listing
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

SPLITS: Final = ("train", "validation", "test")


@dataclass(frozen=True, slots=True, eq=False)
class Sequence:
    """One sequence of a file.

    Attributes:
        id: Id in the file; else the 0-based index as a string.
        values: float32 [steps, features], C-contiguous, writable, finite; 1 step and 1 feature or more.
        label: Class name; None if the file has none for this sequence.
        split: "train", "validation" or "test"; None if the file has none.
        row: 1-based position in the file, for messages: the row of a table, the line of a text.
    """

    id: str
    values: NDArray[np.float32]
    label: str | None = None
    split: str | None = None
    row: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """Consecutive sequences of a file, concatenated, so that none costs an object of its own.

    Attributes:
        values: float32 [total steps, features], C-contiguous, finite.
        lengths: int64 [sequences], the steps of each, 1 or more.
        ids: Id of each; see Sequence.
        labels: Label of each, or None.
        splits: Split of each, or None.
        rows: Position of each in the file, counted from 1.
    """

    values: NDArray[np.float32]
    lengths: NDArray[np.int64]
    ids: Listing[str]
    labels: Listing[str | None]
    splits: Listing[str | None]
    rows: Listing[int]

    @classmethod
    def of(cls, sequences: Listing[Sequence]) -> "Block":
        """Concatenates sequences, at least one."""
        return cls(
            values=np.concatenate([each.values for each in sequences]),
            lengths=np.array([len(each.values) for each in sequences], np.int64),
            ids=[each.id for each in sequences],
            labels=[each.label for each in sequences],
            splits=[each.split for each in sequences],
            rows=[each.row for each in sequences],
        )

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[Sequence]:
        bounds = pairwise([0, *self.lengths.cumsum().tolist()])
        names = zip(bounds, self.ids, self.labels, self.splits, self.rows, strict=True)
        for (begin, end), name, label, split, row in names:
            yield Sequence(id=name, values=self.values[begin:end], label=label, split=split, row=row)

    def parts(self, sequences: int, values: int) -> "Iterator[Block]":
        """Cuts the block into parts of at most `sequences` sequences and `values` numbers; a longer one is alone."""
        ends = self.lengths.cumsum()
        most = values // self.values.shape[1]
        first = step = 0
        while first < len(self):
            last = int(np.searchsorted(ends, step + most, side="right"))
            last = min(max(last, first + 1), first + sequences)
            end = int(ends[last - 1])
            own = slice(first, last)
            columns = (self.ids[own], self.labels[own], self.splits[own], self.rows[own])
            yield Block(self.values[step:end], self.lengths[own], *columns)
            first, step = last, end


class SequenceError(ValueError):
    """A sequence file can't be used; str() is one line naming the file, the row, the column, and what is wrong."""

    def __init__(self, path: Path, what: str, *, row: int | None = None, column: str | None = None) -> None:
        parts = [str(path)]
        if row is not None:
            parts.append(f"row {row}")
        if column is not None:
            parts.append(f"column '{column}'")
        super().__init__(": ".join([*parts, " ".join(what.split())]))
