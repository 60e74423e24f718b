"""Results of reading a sequence file: sequences, or an error of one line."""

from dataclasses import dataclass
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
    """A sequence file can't be used; str() is one line naming the file, the row, the column, and what is wrong."""

    def __init__(self, path: Path, what: str, *, row: int | None = None, column: str | None = None) -> None:
        parts = [str(path)]
        if row is not None:
            parts.append(f"row {row}")
        if column is not None:
            parts.append(f"column '{column}'")
        super().__init__(": ".join([*parts, " ".join(what.split())]))
