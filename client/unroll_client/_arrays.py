"""Sequences of the caller to the ragged float32 of the wire, and back."""

from collections.abc import Iterable
from collections.abc import Sequence as Listing
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from unroll_client._errors import FieldViolation, InvalidArgument

FLOAT32 = np.dtype("<f4")


def invalid(field: str, what: str) -> InvalidArgument:
    """The error for one part of what the caller gave."""
    return InvalidArgument(f"{field}: {what}", fields=[FieldViolation(field, what)])


def check_number(field: str, value: int, least: int = 0, bits: int = 32) -> None:
    """Raises InvalidArgument where a number is none that the wire can carry."""
    if not least <= value < 1 << bits:
        raise invalid(field, f"{value}, {least} to {(1 << bits) - 1} expected")


@dataclass(slots=True)  # frozen would double the cost of making one
class Ragged:
    """Sequences end to end, as the wire has them.

    Attributes:
        values: Little-endian float32 [total steps, features], row-major.
        lengths: Timesteps of each sequence.
        features: Numbers a timestep; 0 where there are no sequences.
    """

    values: bytes
    lengths: list[int]
    features: int


def pack(sequences: Iterable[ArrayLike]) -> Ragged:
    """Puts sequences end to end.

    Args:
        sequences: Arrays [steps, features] of any numeric dtype, with the same number of features.

    Raises:
        InvalidArgument: one is no such array, has no steps or features, or holds a number that is no finite
            float32; the message and the field name it, as in `sequences[3]`.
    """
    arrays = [_numeric(sequence, "sequences", index) for index, sequence in enumerate(sequences)]
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
        raise invalid(f"sequences[{index}]", f"[{step}][{column}] is no finite float32")
    return Ragged(values, lengths, features)


def pack_chunk(chunk: ArrayLike, features: int) -> NDArray[np.float32]:
    """Makes float32 [steps, features] of the next timesteps of a sequence.

    Raises:
        InvalidArgument: `chunk` is no array [steps, features] of numbers that are finite in float32, 1 step or more.
    """
    array = _numeric(chunk, "chunk")
    if array.shape[1] != features:
        raise invalid("chunk", f"{array.shape[1]} features, the model has {features}")
    with np.errstate(over="ignore"):
        values = np.ascontiguousarray(array, dtype=FLOAT32)
    bad = _first_non_finite(values.reshape(-1))
    if bad is not None:
        raise invalid("chunk", f"[{bad // features}][{bad % features}] is no finite float32")
    return values


def unpack(data: bytes, rows: int, columns: int) -> NDArray[np.float32]:
    """Reads float32 [rows, columns] that the server sent, as a new array.

    Raises:
        ValueError: there are not that many numbers.
    """
    if rows and not data:
        raise ValueError(f"0 bytes for {rows} rows")
    return np.frombuffer(data, FLOAT32).reshape(rows, columns).astype(np.float32)


def join(parts: Listing[NDArray[np.float32]]) -> NDArray[np.float32]:
    """Puts arrays end to end; one alone is not copied."""
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _numeric(value: ArrayLike, name: str, index: int | None = None) -> NDArray[np.generic]:
    try:
        array = np.asarray(value)
    except ValueError:
        problem = "an array [steps, features] expected, got rows of unequal lengths"
    else:
        if array.ndim == 2 and array.size and array.dtype.kind in "fiub":
            return array
        problem = _unfitness(array)
    raise invalid(name if index is None else f"{name}[{index}]", problem) from None


def _unfitness(array: NDArray[np.generic]) -> str:
    if array.dtype.kind not in "fiub":
        return f"numbers expected, got dtype {array.dtype}"
    if array.ndim != 2:
        hint = "; one feature is [steps, 1]" if array.ndim == 1 else ""
        return f"an array [steps, features] expected, got shape {list(array.shape)}{hint}"
    return f"1 step and 1 feature or more expected, got shape {list(array.shape)}"


def _joined_bytes(arrays: list[NDArray[np.generic]]) -> bytes:
    if any(array.dtype != FLOAT32 for array in arrays):
        with np.errstate(over="ignore"):
            arrays = [array.astype(FLOAT32, copy=False) for array in arrays]
    # Of one array tobytes is faster; of many, join copies each once, where it needs no other order.
    return arrays[0].tobytes() if len(arrays) == 1 else b"".join([np.ascontiguousarray(array).data for array in arrays])


def _first_non_finite(values: NDArray[np.float32]) -> int | None:
    finite = np.isfinite(values)
    return None if finite.all() else int(finite.argmin())
