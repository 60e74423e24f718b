"""npz: the arrays `values` and `lengths`, and optionally `labels`, `splits`, `ids`; never pickled."""

import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unroll_proto.sequences.checks import SequenceChecks, check_split
from unroll_proto.sequences.types import Sequence, SequenceError

VALUES, LENGTHS, LABELS, SPLITS, IDS = "values", "lengths", "labels", "splits", "ids"

# What zipfile, zlib and numpy raise for a file that is cut off, damaged, pickled or of a forged size.
_LOAD_ERRORS = (
    OSError,
    ValueError,
    EOFError,
    MemoryError,
    NotImplementedError,
    zipfile.BadZipFile,
    zlib.error,
)


def read_npz(path: Path) -> Iterator[Sequence]:
    """Loads the arrays, then gives sequence by sequence; `row` is the 1-based index."""
    arrays = _load(path, (VALUES, LENGTHS, LABELS, SPLITS, IDS))
    lengths = _lengths(path, arrays)
    values = _values(path, arrays, int(lengths.sum()))
    labels, splits, ids = (_names(path, arrays, name, len(lengths)) for name in (LABELS, SPLITS, IDS))
    checks = SequenceChecks(path, column=VALUES)
    ends = np.cumsum(lengths)
    for index, (start, end) in enumerate(zip((ends - lengths).tolist(), ends.tolist(), strict=True)):
        split = splits[index] if splits is not None else None
        yield Sequence(
            id=str(index) if ids is None else ids[index],
            values=checks.values(values[start:end], index + 1),
            label=None if labels is None else labels[index],
            split=check_split(path, split or None, index + 1),
            row=index + 1,
        )


def count_npz(path: Path) -> int:
    """Counts the sequences by `lengths` alone."""
    return len(_lengths(path, _load(path, (LENGTHS,))))


def _load(path: Path, names: tuple[str, ...]) -> dict[str, NDArray[Any]]:
    name = None
    try:
        # numpy leaves a file open that it can't make sense of.
        with path.open("rb") as file:
            archive = np.load(file, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise SequenceError(path, "one bare array, an npz archive expected")
            with archive:
                arrays = {}
                for name in names:
                    if name in archive:
                        arrays[name] = archive[name]
                return arrays
    except (SequenceError, FileNotFoundError, IsADirectoryError, PermissionError):
        raise
    except _LOAD_ERRORS as error:
        raise SequenceError(path, f"no npz that can be read without pickle: {error}", column=name) from None


def _lengths(path: Path, arrays: dict[str, NDArray[Any]]) -> NDArray[np.int64]:
    if LENGTHS not in arrays:
        raise SequenceError(path, f"missing; the arrays are {sorted(arrays)}", column=LENGTHS)
    lengths = arrays[LENGTHS]
    if lengths.ndim != 1 or lengths.dtype.kind not in "iu":
        what = f"integers [sequences] expected, got {lengths.dtype} {list(lengths.shape)}"
        raise SequenceError(path, what, column=LENGTHS)
    bad = np.flatnonzero((lengths < 1) | (lengths > np.iinfo(np.int32).max))
    if bad.size:
        row = int(bad[0])
        what = "an empty sequence" if lengths[row] == 0 else f"{lengths[row]} is no length"
        raise SequenceError(path, what, row=row + 1, column=LENGTHS)
    return lengths.astype(np.int64)


def _values(path: Path, arrays: dict[str, NDArray[Any]], total: int) -> NDArray[Any]:
    if VALUES not in arrays:
        raise SequenceError(path, f"missing; the arrays are {sorted(arrays)}", column=VALUES)
    values = arrays[VALUES]
    if values.ndim != 2 or values.dtype.kind not in "iuf":
        what = f"numbers [total steps, features] expected, got {values.dtype} {list(values.shape)}"
        raise SequenceError(path, what, column=VALUES)
    if len(values) != total:
        raise SequenceError(path, f"has {len(values)} steps, but the lengths add up to {total}", column=VALUES)
    return values


def _names(path: Path, arrays: dict[str, NDArray[Any]], name: str, count: int) -> list[str] | None:
    if name not in arrays:
        return None
    array = arrays[name]
    if array.ndim != 1 or array.dtype.kind not in "iuUS":
        what = f"strings or integers [sequences] expected, got {array.dtype} {list(array.shape)}"
        raise SequenceError(path, what, column=name)
    if len(array) != count:
        raise SequenceError(path, f"has {len(array)} entries for {count} sequences", column=name)
    if array.dtype.kind == "S":
        try:
            return [value.decode() for value in array.tolist()]
        except UnicodeDecodeError:
            raise SequenceError(path, "bytes that are no UTF-8", column=name) from None
    return [str(value) for value in array.tolist()]
