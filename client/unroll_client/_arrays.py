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


@dataclass(frozen=True, slots=True)
class Ragged:
    """Sequences end to end.

    Attributes:
        values: float32 [total steps, features], little-endian.
        lengths: int64 [sequences].
    """

    values: NDArray[np.float32]
    lengths: NDArray[np.int64]


def pack(sequences: Iterable[ArrayLike]) -> Ragged:
    """Puts sequences end to end.

    Args:
        sequences: Arrays [steps, features] of any numeric dtype, with the same number of features.

    Raises:
        InvalidArgument: one is no such array, has no steps or features, or holds a number that is no finite
            float32; the message and the field name it, as in `sequences[3]`.
    """
    arrays = [_numeric(sequence, f"sequences[{index}]") for index, sequence in enumerate(sequences)]
    if not arrays:
        return Ragged(np.empty((0, 0), FLOAT32), np.empty(0, np.int64))
    features = arrays[0].shape[1]
    for index, array in enumerate(arrays):
        if array.shape[1] != features:
            what = f"{array.shape[1]} features, {features} expected as in sequences[0]"
            raise invalid(f"sequences[{index}]", what)
    lengths = np.fromiter(map(len, arrays), np.int64, len(arrays))
    with np.errstate(over="ignore"):
        values = np.concatenate(arrays, dtype=FLOAT32, casting="same_kind")
    bad = _first_non_finite(values)
    if bad is not None:
        index = int(np.searchsorted(np.cumsum(lengths), bad[0], side="right"))
        step = bad[0] - int(lengths[:index].sum())
        raise invalid(f"sequences[{index}]", f"[{step}][{bad[1]}] is no finite float32")
    return Ragged(values, lengths)


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
    bad = _first_non_finite(values)
    if bad is not None:
        raise invalid("chunk", f"[{bad[0]}][{bad[1]}] is no finite float32")
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


def _numeric(value: ArrayLike, name: str) -> NDArray[np.generic]:
    try:
        array = np.asarray(value)
    except ValueError:
        raise invalid(name, "an array [steps, features] expected, got rows of unequal lengths") from None
    if array.dtype.kind not in "fiub":
        raise invalid(name, f"numbers expected, got dtype {array.dtype}")
    if array.ndim != 2:
        hint = "; one feature is [steps, 1]" if array.ndim == 1 else ""
        raise invalid(name, f"an array [steps, features] expected, got shape {list(array.shape)}{hint}")
    if not array.size:
        raise invalid(name, f"1 step and 1 feature or more expected, got shape {list(array.shape)}")
    return array


def _first_non_finite(values: NDArray[np.float32]) -> tuple[int, int] | None:
    # A finite sum proves all terms finite, without a temporary array; anything else is looked at closely.
    with np.errstate(over="ignore", invalid="ignore"):
        if np.isfinite(values.sum()):
            return None
    bad = np.argwhere(~np.isfinite(values))
    return (int(bad[0][0]), int(bad[0][1])) if len(bad) else None
