"""npz: the arrays `values` and `lengths`, and optionally `labels`, `splits`, `ids`. npy: one array. Never pickled."""

import zipfile
import zlib
from collections.abc import Iterator
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from unroll_proto.sequences.checks import ID, LABEL, SPLIT, Reading
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


def read_npz(file: IO[bytes], reading: Reading) -> Iterator[Sequence | SequenceError]:
    """Loads the arrays, then yields sequence by sequence; `row` is the 1-based index."""
    arrays = _load(file, reading, (VALUES, LENGTHS, LABELS, SPLITS, IDS))
    lengths = _lengths(arrays, reading)
    values = _values(arrays, reading, int(lengths.sum()))
    names = {
        reading.name(role): _names(arrays, reading, key, len(lengths))
        for role, key in ((ID, IDS), (LABEL, LABELS), (SPLIT, SPLITS))
        if key in arrays
    }
    ends = np.cumsum(lengths).tolist()
    for index, (end, length) in enumerate(zip(ends, lengths.tolist(), strict=True)):
        if index < reading.skip:
            continue
        row = index + 1
        try:
            if not length:
                raise reading.fail("an empty sequence", row, LENGTHS)
            own = {key: _name(array, reading, index, f"{key}s") for key, array in names.items()}
            if own.get(SPLIT) == "":
                own[SPLIT] = None
            yield reading.make(index, row, values[end - length : end], own, VALUES, plural="s")
        except SequenceError as error:
            yield error


def read_npy(file: IO[bytes], reading: Reading) -> Iterator[Sequence | SequenceError]:
    """Reads an array [sequences, steps, features] or [sequences, steps]; steps of NaN at the end are padding."""
    try:
        version = np.lib.format.read_magic(file)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, by_columns, dtype = read_header(file)
    except ValueError as error:
        raise reading.fail(f"not a readable npy: {error}") from None
    if dtype.kind not in "iuf" or len(shape) not in (2, 3) or by_columns:
        order = " in Fortran's order" if by_columns else ""
        what = f"numbers [sequences, steps, features] or [sequences, steps] expected, got {dtype} {list(shape)}{order}"
        raise reading.fail(what)
    steps, features = shape[1], shape[2] if len(shape) == 3 else 1
    size = steps * features * dtype.itemsize
    for index in range(shape[0]):
        data = file.read(size)
        if len(data) != size:
            raise reading.fail("the file is cut off", index + 1)
        if index < reading.skip:
            continue
        values = np.frombuffer(data, dtype).reshape(steps, features)
        length = len(values) if dtype.kind != "f" else unpadded(values[None])[0]
        try:
            yield reading.make(index, index + 1, values[:length], {}, VALUES)
        except SequenceError as error:
            yield error


def unpadded(values: NDArray[Any]) -> NDArray[np.int64]:
    """Returns the lengths, int64 [sequences], of floats [sequences, steps, features] up to steps of NaN at the end."""
    there = ~np.isnan(values).all(axis=2)
    return np.where(there.any(axis=1), there.shape[1] - there[:, ::-1].argmax(axis=1), 0).astype(np.int64)


def _load(file: IO[bytes], reading: Reading, names: tuple[str, ...]) -> dict[str, NDArray[Any]]:
    name = None
    try:
        archive = np.load(file, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise reading.fail(f"one bare array, expected an archive with {VALUES} and {LENGTHS}; name it .npy")
        with archive:
            missing = [name for name in (VALUES, LENGTHS) if name not in archive]
            if missing:
                held = f"the arrays are {archive.files!r:.200}" if archive.files else "the archive is empty"
                raise reading.fail(f"missing; {held}", column=missing[0])
            arrays = {}
            for name in names:
                if name in archive:
                    arrays[name] = archive[name]
                    # numpy returns the raw bytes of a member that is not an array.
                    if not isinstance(arrays[name], np.ndarray):
                        raise reading.fail("not an array in numpy's format", column=name)
            return arrays
    except SequenceError:
        raise
    except _LOAD_ERRORS as error:
        if "allow_pickle" not in str(error):
            raise reading.fail(f"not a readable npz: {error}", column=name) from None
        # numpy takes unknown content for a pickle.
        what = "an object array, which only pickle can load; save numbers or strings" if name else "not an npz archive"
        raise reading.fail(what, column=name) from None


def _lengths(arrays: dict[str, NDArray[Any]], reading: Reading) -> NDArray[np.int64]:
    lengths = arrays[LENGTHS]
    if lengths.ndim != 1 or lengths.dtype.kind not in "iu":
        what = f"integers [sequences] expected, got {lengths.dtype} {list(lengths.shape)}"
        raise reading.fail(what, column=LENGTHS)
    bad = np.flatnonzero((lengths < 0) | (lengths > np.iinfo(np.int32).max))
    if bad.size:
        row = int(bad[0])
        raise reading.fail(f"{lengths[row]} is not a length", row + 1, LENGTHS)
    return lengths.astype(np.int64)


def _values(arrays: dict[str, NDArray[Any]], reading: Reading, total: int) -> NDArray[Any]:
    values = arrays[VALUES]
    if values.ndim != 2 or values.dtype.kind not in "iuf":
        what = f"numbers [total steps, features] expected, got {values.dtype} {list(values.shape)}"
        raise reading.fail(what, column=VALUES)
    if len(values) != total:
        raise reading.fail(f"has {len(values)} steps, but the lengths add up to {total}", column=VALUES)
    return values


def _names(arrays: dict[str, NDArray[Any]], reading: Reading, name: str, count: int) -> NDArray[Any]:
    array = arrays[name]
    if array.ndim != 1 or array.dtype.kind not in "iufbUS":
        what = f"strings or integers [sequences] expected, got {array.dtype} {list(array.shape)}"
        raise reading.fail(what, column=name)
    if len(array) != count:
        raise reading.fail(f"has {len(array)} entries for {count} sequences", column=name)
    return array


def _name(names: NDArray[Any], reading: Reading, index: int, column: str) -> object:
    try:
        value = names[index].item()
        return value.decode() if isinstance(value, bytes) else value
    # numpy raises SystemError for a character number beyond Unicode.
    except (UnicodeDecodeError, ValueError, SystemError):
        raise reading.fail("not UTF-8 text", index + 1, column) from None
