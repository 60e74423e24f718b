"""Conversion between the caller's arrays and the packed float32 of the wire."""

import sys
from collections.abc import Iterable
from collections.abc import Sequence as Listing
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from unroll_client._errors import FieldViolation, InvalidArgument

FLOAT32 = np.dtype("<f4")
# float32 represents every integer up to this. Beyond, it represents those of at most 24 significant bits.
_EXACT_INTEGERS = 1 << 24


def invalid(field: str, what: str) -> InvalidArgument:
    """Makes the error for one part of the caller's input."""
    return InvalidArgument(f"{field}: {what}", fields=[FieldViolation(field, what)])


def check_number(field: str, value: int, least: int = 0, bits: int = 32) -> None:
    """Raises InvalidArgument if a number does not fit the wire: `least` to 2**bits - 1."""
    if not least <= value < 1 << bits:
        raise invalid(field, f"{value}, {least} to {(1 << bits) - 1} expected")


@dataclass(slots=True)  # frozen would double the cost of construction
class Ragged:
    """Sequences of any lengths, concatenated as on the wire.

    Attributes:
        values: Little-endian float32 [total steps, features], row-major.
        lengths: Timesteps of each sequence.
        features: Features of a timestep; 0 without sequences.
    """

    values: bytes
    lengths: list[int]
    features: int


def pack(sequences: Iterable[ArrayLike]) -> Ragged:
    """Concatenates sequences.

    Args:
        sequences: Arrays [steps, features] with the same number of features. Their numbers must fit float32: floats
            are rounded to the nearest, integers must be exact.

    Raises:
        InvalidArgument: a sequence is not such an array, has no steps or features, or holds a number that is not
            finite in float32. The message and the field name it, as in `sequences[3]`.
    """
    if not hasattr(sequences, "__iter__"):
        raise invalid("sequences", f"a list of arrays expected, got {type(sequences).__name__}")
    arrays = [_numeric(sequence, f"sequences[{index}]") for index, sequence in enumerate(sequences)]
    if not arrays:
        return Ragged(b"", [], 0)
    features = arrays[0].shape[1]
    for index, array in enumerate(arrays):
        if array.shape[1] != features:
            what = f"{array.shape[1]} features, {features} expected as in sequences[0]"
            raise invalid(f"sequences[{index}]", what)
    lengths = [len(array) for array in arrays]
    values = _joined_bytes(arrays)
    bad = _first_non_finite(np.frombuffer(values, FLOAT32))
    if bad is not None:
        row, column = divmod(bad, features)
        ends = np.cumsum(lengths)
        index = int(np.searchsorted(ends, row, side="right"))
        step = row - int(ends[index]) + lengths[index]
        raise invalid(f"sequences[{index}]", f"[{step}][{column}] is not finite in float32")
    return Ragged(values, lengths, features)


def pack_chunk(chunk: ArrayLike, features: int | None = None) -> NDArray[np.float32]:
    """Converts the next timesteps of a sequence to float32 [steps, features].

    Args:
        chunk: An array as `pack` takes it.
        features: Features of the model; None accepts any number.

    Raises:
        InvalidArgument: as in `pack`, or the number of features differs.
    """
    array = _numeric(chunk, "chunk")
    columns = array.shape[1]
    if features is not None and columns != features:
        raise invalid("chunk", f"{columns} features, the model has {features}")
    with np.errstate(over="ignore"):
        values = np.ascontiguousarray(array, dtype=FLOAT32)
    bad = _first_non_finite(values.reshape(-1))
    if bad is not None:
        raise invalid("chunk", f"[{bad // columns}][{bad % columns}] is not finite in float32")
    return values


def cut(
    values: NDArray[np.float32], max_steps: int, max_message_bytes: int, envelope: int
) -> list[NDArray[np.float32]]:
    """Cuts a chunk [steps, features] into parts within the server's limits.

    Args:
        values: The chunk.
        max_steps: Largest number of steps of a part; 0 for no limit.
        max_message_bytes: Largest size of the message that carries a part; 0 for no limit.
        envelope: Bytes of a message besides the values.
    """
    most = max_steps or len(values)
    if max_message_bytes:
        most = min(most, (max_message_bytes - envelope) // (FLOAT32.itemsize * values.shape[1]))
    most = max(most, 1)
    return [values[start : start + most] for start in range(0, len(values), most)]


def unpack(data: bytes, rows: int, columns: int) -> NDArray[np.float32]:
    """Decodes float32 [rows, columns] from the server into a new array.

    Raises:
        ValueError: the number of values is another.
    """
    if not columns:
        return np.empty((rows, 0), np.float32)
    if rows and not data:
        raise ValueError(f"0 bytes for {rows} rows")
    return np.frombuffer(data, FLOAT32).reshape(rows, columns).astype(np.float32)


def join(parts: Listing[NDArray[np.float32]]) -> NDArray[np.float32]:
    """Concatenates arrays along the first axis; a single array is not copied."""
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _numeric(value: ArrayLike, name: str) -> NDArray[np.generic]:
    array = value if type(value) is np.ndarray else _as_array(value, name)
    if array.ndim != 2 or not array.size or not _is_number(array.dtype):
        raise invalid(name, _unfitness(array))
    if array.dtype.kind in "iu" and array.dtype.itemsize > 2:
        _check_exact(array, name)
    return array


def _as_array(value: Any, name: str) -> NDArray[np.generic]:
    """Converts a list, a tensor or another library's array to a NumPy array."""
    # A list of masked rows would lose their masks.
    if any(np.ma.is_masked(part) for part in (value if isinstance(value, list | tuple) else [value])):
        raise invalid(name, "masked values, which are not numbers: fill or drop them")
    torch = sys.modules.get("torch")
    try:
        if torch is not None and isinstance(value, torch.Tensor):
            value = value.detach().cpu()
            # NumPy has neither bfloat16 nor the 8-bit floats.
            return np.asarray(value.float() if value.is_floating_point() and value.itemsize < 4 else value)
        if hasattr(value, "__dlpack__") and not hasattr(value, "__array__"):
            return np.from_dlpack(value)
        return np.asarray(value)
    except MemoryError:
        raise
    except Exception as error:  # Any library may raise any exception.
        if "inhomogeneous" in str(error):
            problem = "an array [steps, features] expected, got rows of unequal lengths"
        else:
            reason = " ".join(str(error).split()) or type(error).__name__
            problem = f"{type(value).__name__} can't be read as an array: {reason}"
        raise invalid(name, problem) from error


def _is_number(dtype: np.dtype[Any]) -> bool:
    # The second test accepts types that other libraries register with NumPy, such as bfloat16 of ml_dtypes.
    return dtype.kind in "fiub" or (dtype.fields is None and np.can_cast(dtype, np.float32))


def _unfitness(array: NDArray[np.generic]) -> str:
    if not _is_number(array.dtype):
        return f"numbers expected, got dtype {array.dtype}"
    if array.ndim != 2:
        hint = "; one feature is [steps, 1]" if array.ndim == 1 else ""
        return f"an array [steps, features] expected, got shape {list(array.shape)}{hint}"
    return f"1 step and 1 feature or more expected, got shape {list(array.shape)}"


def _check_exact(array: NDArray[Any], name: str) -> None:
    """Raises InvalidArgument if float32 can't represent an integer: an id or a count must not be rounded."""
    if array.min() >= -_EXACT_INTEGERS and array.max() <= _EXACT_INTEGERS:
        return
    # The absolute value of the least signed integer fits only the unsigned type of the same width.
    size = np.abs(array).astype(f"u{array.dtype.itemsize}").astype(np.uint64)
    last_bit = np.maximum(size & (~size + np.uint64(1)), np.uint64(1))
    inexact = size // last_bit >= _EXACT_INTEGERS
    if inexact.any():
        step, column = np.argwhere(inexact)[0]
        what = f"[{step}][{column}] is {array[step, column]}, which float32 can't hold"
        raise invalid(name, f"{what}; where rounding does no harm, make it a float")


def _joined_bytes(arrays: list[NDArray[np.generic]]) -> bytes:
    if any(array.dtype != FLOAT32 for array in arrays):
        with np.errstate(over="ignore"):
            arrays = [array.astype(FLOAT32, copy=False) for array in arrays]
    # tobytes is faster for one array; join copies each of several once, if it is row-major.
    return arrays[0].tobytes() if len(arrays) == 1 else b"".join([np.ascontiguousarray(array).data for array in arrays])


def _first_non_finite(values: NDArray[np.float32]) -> int | None:
    finite = np.isfinite(values)
    return None if finite.all() else int(finite.argmin())
