"""Results of reading sequence files: blocks of sequences, single sequences, and errors of one line."""

from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Listing
from dataclasses import dataclass, replace
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


class SequenceError(ValueError):
    """A sequence file can't be used; str() is one line naming the file, the row, the column, and what is wrong.

    Attributes:
        file: The file's path or URL.
        row: 1-based position of the row that can't be used; None if the error is about the whole file.
        column: Name of the column; None if the error is not about one.
        reason: The problem, on one line.
    """

    def __init__(self, file: str | Path, what: str, *, row: int | None = None, column: str | None = None) -> None:
        self.file, self.row, self.column = str(file), row, column
        self.reason = " ".join(what.split())
        parts = [self.file]
        if row is not None:
            parts.append(f"row {row}")
        if column is not None:
            parts.append(f"column '{column}'")
        super().__init__(": ".join([*parts, self.reason]))

    @property
    def place(self) -> int:
        """The row; 0 if the error is about the whole file."""
        return self.row or 0


class UnreadableError(SequenceError):
    """A file or folder can't be found or read, whatever it holds; never an error of one row."""


@dataclass(frozen=True, slots=True)
class Columns:
    """Names of the columns to read; None takes the usual name if the file has such a column.

    Attributes:
        sequence: Column of whole sequences: lists of timesteps; usually `sequence`.
        id: Usually `id`.
        time: Column of the time of a timestep, in a table with a row for each timestep; usually `time`.
        features: Columns of the features, in their order; empty for all columns that are left.
        label: Usually `label`.
    """

    sequence: str | None = None
    id: str | None = None
    time: str | None = None
    features: tuple[str, ...] = ()
    label: str | None = None


@dataclass(frozen=True, slots=True)
class Expected:
    """Features that the sequences of a file must have.

    Attributes:
        names: Name of each feature in order. A table with such columns is read in this order, other columns are left
            out.
        by: Whoever expects them, as in "model jv".
    """

    names: tuple[str, ...]
    by: str


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """Consecutive sequences of a file, concatenated, so that none costs an object of its own.

    Attributes:
        values: float32 [total steps, features], C-contiguous, writable, finite.
        lengths: int64 [sequences], the steps of each, 1 or more.
        ids: Id of each; see Sequence.
        labels: Label of each, or None.
        splits: Split of each, or None.
        rows: Position of each in the file, counted from 1.
        refused: Errors of the rows between them that can't be used, in the order of the file.
        features: Name of each feature; empty if the file names none.
    """

    values: NDArray[np.float32]
    lengths: NDArray[np.int64]
    ids: Listing[str]
    labels: Listing[str | None]
    splits: Listing[str | None]
    rows: Listing[int]
    refused: Listing[SequenceError] = ()
    features: tuple[str, ...] = ()

    @classmethod
    def of(cls, sequences: Listing[Sequence], refused: Listing[SequenceError] = ()) -> "Block":
        """Concatenates sequences."""
        values = [each.values for each in sequences] or [np.empty((0, 1), np.float32)]
        return cls(
            values=np.concatenate(values),
            lengths=np.array([len(each.values) for each in sequences], np.int64),
            ids=[each.id for each in sequences],
            labels=[each.label for each in sequences],
            splits=[each.split for each in sequences],
            rows=[each.row for each in sequences],
            refused=refused,
        )

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[Sequence]:
        """Yields each sequence; its values are a view of the block's."""
        bounds = pairwise([0, *self.lengths.cumsum().tolist()])
        names = zip(bounds, self.ids, self.labels, self.splits, self.rows, strict=True)
        for (begin, end), name, label, split, row in names:
            yield Sequence(id=name, values=self.values[begin:end], label=label, split=split, row=row)

    @property
    def taken(self) -> int:
        """Number of sequences of the file that the block stands for, the refused ones included."""
        return len(self.lengths) + len(self.refused)

    def checked(self) -> Iterator[Sequence]:
        """Yields each sequence.

        Raises:
            SequenceError: a row was refused; raised in its place.
        """
        bad = self.refused[0] if self.refused else None
        for sequence in self:
            if bad is not None and bad.place < sequence.row:
                break
            yield sequence
        if bad is not None:
            raise bad

    def without(self, problems: Mapping[int, SequenceError]) -> "Block":
        """Returns the block without some of its sequences, which are refused.

        Args:
            problems: The error of each, by its index.
        """
        kept = [sequence for index, sequence in enumerate(self) if index not in problems]
        refused = sorted([*self.refused, *problems.values()], key=lambda error: error.place)
        return replace(Block.of(kept, refused), features=self.features)

    def after(self, first: int) -> "Block":
        """Returns the block without the sequences and refused rows before row `first`."""
        kept = [sequence for sequence in self if sequence.row >= first]
        refused = [error for error in self.refused if error.place >= first]
        return replace(Block.of(kept, refused), features=self.features)

    def parts(self, sequences: int, values: int) -> "Iterator[Block]":
        """Cuts the block into parts of at most `sequences` sequences and `values` numbers; a longer one is alone."""
        if len(self) <= sequences and self.values.size <= values:
            yield self
            return
        ends = self.lengths.cumsum()
        most = values // self.values.shape[1]
        first = step = bad = 0
        while first < len(self):
            last = int(np.searchsorted(ends, step + most, side="right"))
            last = min(max(last, first + 1), first + sequences, len(self))
            end = int(ends[last - 1])
            # Refused rows go with the sequences before them.
            after = bad
            while after < len(self.refused) and (last == len(self) or self.refused[after].place < self.rows[last]):
                after += 1
            own = slice(first, last)
            columns = (self.ids[own], self.labels[own], self.splits[own], self.rows[own])
            refused = self.refused[bad:after]
            yield Block(self.values[step:end], self.lengths[own], *columns, refused, self.features)
            first, step, bad = last, end, after
