"""npz: the arrays `values` and `lengths`, and optionally `labels`, `splits`, `ids`; never pickled."""

import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unroll_proto.sequences.checks import SequenceChecks, check_name, check_split
from unroll_proto.sequences.types import Sequence, SequenceError

VALUES, LENGTHS, LABELS, SPLITS, IDS = "values", "lengths", "labels", "splits", "ids"

# Exceptions of zipfile, zlib and numpy for a file that is truncated, damaged, encrypted, pickled or of a forged size.
_LOAD_ERRORS = (
    OSError,
    ValueError,
    EOFError,
    MemoryError,
    RuntimeError,
    zipfile.BadZipFile,
    zlib.error,
)


def read_npz(path: Path) -> Iterator[Sequence]:
    """Loads the arrays, then yields sequence by sequence; `row` is the 1-based index."""
    arrays = _load(path, (VALUES, LENGTHS, LABELS, SPLITS, IDS))
    lengths = _lengths(path, arrays)
    values = _values(path, arrays, int(lengths.sum()))
    labels, splits, ids = (_names(path, arrays, name, len(lengths)) for name in (LABELS, SPLITS, IDS))
    checks = SequenceChecks(path, column=VALUES)
    ends = np.cumsum(lengths)
    for index, (start, end) in enumerate(zip((ends - lengths).tolist(), ends.tolist(), strict=True)):
        name = _name(path, ids, index, IDS)
        yield Sequence(
            id=str(index) if name is None else name,
            values=checks.values(values[start:end], index + 1),
            label=_name(path, labels, index, LABELS),
            split=check_split(path, _name(path, splits, index, SPLITS) or None, index + 1, SPLITS),
            row=index + 1,
        )


def count_npz(path: Path) -> int:
    """Counts the sequences from `lengths`."""
    return len(_lengths(path, _load(path, (LENGTHS,))))


def _load(path: Path, names: tuple[str, ...]) -> dict[str, NDArray[Any]]:
    name = None
    try:
        # numpy does not close a file that it can't read.
        with path.open("rb") as file:
            archive = np.load(file, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise SequenceError(path, f"one bare array (.npy), expected an archive with {VALUES} and {LENGTHS}")
            with archive:
                missing = [name for name in (VALUES, LENGTHS) if name not in archive]
                if missing:
                    held = f"the arrays are {archive.files!r:.200}" if archive.files else "the archive is empty"
                    raise SequenceError(path, f"missing; {held}", column=missing[0])
                arrays = {}
                for name in names:
                    if name in archive:
                        arrays[name] = archive[name]
                        # numpy returns the raw bytes of a member that is not an array.
                        if not isinstance(arrays[name], np.ndarray):
                            raise SequenceError(path, "not an array in numpy's format", column=name)
                return arrays
    except (SequenceError, FileNotFoundError, IsADirectoryError, PermissionError):
        raise
    except _LOAD_ERRORS as error:
        if "allow_pickle" not in str(error):
            raise SequenceError(path, f"not a readable npz: {error}", column=name) from None
        # numpy takes unknown content for a pickle.
        what = "an object array, which only pickle can load; save numbers or strings" if name else "not an npz archive"
        raise SequenceError(path, what, column=name) from None


def _lengths(path: Path, arrays: dict[str, NDArray[Any]]) -> NDArray[np.int64]:
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
    values = arrays[VALUES]
    if values.ndim != 2 or values.dtype.kind not in "iuf":
        what = f"numbers [total steps, features] expected, got {values.dtype} {list(values.shape)}"
        raise SequenceError(path, what, column=VALUES)
    if len(values) != total:
        raise SequenceError(path, f"has {len(values)} steps, but the lengths add up to {total}", column=VALUES)
    return values


def _names(path: Path, arrays: dict[str, NDArray[Any]], name: str, count: int) -> NDArray[Any] | None:
    if name not in arrays:
        return None
    array = arrays[name]
    if array.ndim != 1 or array.dtype.kind not in "iuUS":
        what = f"strings or integers [sequences] expected, got {array.dtype} {list(array.shape)}"
        raise SequenceError(path, what, column=name)
    if len(array) != count:
        raise SequenceError(path, f"has {len(array)} entries for {count} sequences", column=name)
    return array


def _name(path: Path, names: NDArray[Any] | None, index: int, column: str) -> str | None:
    if names is None:
        return None
    try:
        value = names[index].item()
        if isinstance(value, bytes):
            value = value.decode()
    # numpy raises SystemError for a character number beyond Unicode.
    except (UnicodeDecodeError, ValueError, SystemError):
        raise SequenceError(path, "not UTF-8 text", row=index + 1, column=column) from None
    return check_name(path, value, index + 1, column)
