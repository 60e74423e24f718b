"""npz: the arrays `values` and `lengths`, and optionally `labels`, `splits`, `ids`. npy: one array. Never pickled."""

import io
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
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
    """Loads all arrays but the values, then reads sequence by sequence; `row` is the 1-based index.

    Values in Fortran's order are loaded, too.
    """
    archive, arrays = _load(file, reading, (LENGTHS, LABELS, SPLITS, IDS))
    lengths = _lengths(arrays, reading)
    names = {
        reading.name(role): _names(arrays, reading, key, len(lengths))
        for role, key in ((ID, IDS), (LABEL, LABELS), (SPLIT, SPLITS))
        if key in arrays
    }
    with archive, _damage(reading, VALUES):
        for index, values in enumerate(_values(archive, reading, lengths)):
            if index < reading.skip:
                continue
            row = index + 1
            try:
                if not len(values):
                    raise reading.fail("an empty sequence", row, LENGTHS)
                own = {key: _name(array, reading, index, f"{key}s") for key, array in names.items()}
                if own.get(SPLIT) == "":
                    own[SPLIT] = None
                yield reading.make(index, row, values, own, VALUES, plural="s")
            except SequenceError as error:
                yield error


def read_npy(file: IO[bytes], reading: Reading) -> Iterator[Sequence | SequenceError]:
    """Reads an array [sequences, steps, features] or [sequences, steps]; steps of NaN at the end are padding."""
    try:
        shape, by_columns, dtype = _header(file)
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


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Reads the beginning of an npy: shape, True for Fortran's order, dtype.

    Raises:
        ValueError: it is none.
    """
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, by_columns, dtype = read(file)
    return shape, by_columns, dtype


@contextmanager
def _damage(reading: Reading, column: str | None = None) -> Iterator[None]:
    """Turns what zipfile and numpy raise for damaged files into errors of the file."""
    try:
        yield
    except SequenceError:
        raise
    except _LOAD_ERRORS as error:
        if "allow_pickle" not in str(error):
            raise reading.fail(f"not a readable npz: {error}", column=column) from None
        # numpy takes unknown content for a pickle.
        what = (
            "an object array, which only pickle can load; save numbers or strings" if column else "not an npz archive"
        )
        raise reading.fail(what, column=column) from None


def _load(file: IO[bytes], reading: Reading, names: tuple[str, ...]) -> tuple[Any, dict[str, NDArray[Any]]]:
    """Opens an archive, and loads some arrays of it."""
    with _damage(reading):
        archive = np.load(file, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise reading.fail(f"one bare array, expected an archive with {VALUES} and {LENGTHS}; name it .npy")
        missing = [name for name in (VALUES, LENGTHS) if name not in archive]
        if missing:
            held = f"the arrays are {archive.files!r:.200}" if archive.files else "the archive is empty"
            raise reading.fail(f"missing; {held}", column=missing[0])
    arrays = {}
    for name in names:
        if name in archive:
            with _damage(reading, name):
                arrays[name] = archive[name]
            # numpy returns the raw bytes of a member that is not an array.
            if not isinstance(arrays[name], np.ndarray):
                raise reading.fail("not an array in numpy's format", column=name)
    return archive, arrays


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


def _values(archive: Any, reading: Reading, lengths: NDArray[np.int64]) -> Iterator[NDArray[Any]]:
    """Yields the values of each sequence, [steps, features]."""
    name = next(name for name in archive.zip.namelist() if name.removesuffix(".npy") == VALUES)
    with archive.zip.open(name) as stream:
        try:
            shape, by_columns, dtype = _header(stream)
        except ValueError:
            raise reading.fail("not an array in numpy's format", column=VALUES) from None
        if len(shape) != 2 or dtype.kind not in "iuf":
            what = f"numbers [total steps, features] expected, got {dtype} {list(shape)}"
            raise reading.fail(what, column=VALUES)
        total = int(lengths.sum())
        if shape[0] != total:
            raise reading.fail(f"has {shape[0]} steps, but the lengths add up to {total}", column=VALUES)
        if by_columns:
            yield from np.split(archive[VALUES], lengths.cumsum()[:-1])
            return
        buffered = io.BufferedReader(stream, 1 << 18)
        for length in lengths.tolist():
            data = buffered.read(length * shape[1] * dtype.itemsize)
            yield np.frombuffer(data, dtype).reshape(length, shape[1])


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
