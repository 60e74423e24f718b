"""Arrays of float32: conversion between the wire's bytes and numpy, and checks of a caller's arrays."""

from collections.abc import Iterable
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from unroll_engine.errors import InvalidRequestError
from unroll_engine.kernel import pack
from unroll_engine.models.spec import Float32Array

FLOAT32 = np.dtype("<f4")
"""Number format of the wire: little-endian on every machine."""
_NATIVE = np.float32 == FLOAT32


class Ragged(NamedTuple):
    """Sequences of any lengths, concatenated: the form that the engine runs without a copy."""

    values: Float32Array
    """float32 [total_steps, features], C-contiguous and finite."""
    lengths: NDArray[np.int64]
    """Timesteps of each sequence, int64 [sequences], 1 or more."""


def to_bytes(array: NDArray[Any]) -> bytes:
    """Returns the bytes of an array, little-endian and row-major."""
    return array.tobytes() if _NATIVE else array.astype(array.dtype.newbyteorder("<")).tobytes()


def matrix(raw: bytes, width: int, dtype: np.dtype[Any] = FLOAT32) -> NDArray[Any]:
    """Returns little-endian numbers as an array [rows, width]; a view of `raw` on little-endian machines."""
    values = np.frombuffer(raw, dtype.newbyteorder("<")).reshape(-1, width)
    return values.astype(dtype.newbyteorder("="), copy=False)


def first_not_finite(values: NDArray[Any]) -> tuple[int, int] | None:
    """Returns row and column of the first NaN or infinity of an array [rows, columns]; None if all are finite."""
    finite = np.isfinite(values)
    # A search for a zero byte: for a short sequence numpy's own reduction takes three times as long.
    if b"\0" not in finite.tobytes():
        return None
    row, column = np.argwhere(~finite)[0]
    return int(row), int(column)


def pack_sequences(sequences: Iterable[ArrayLike] | Ragged, features: int) -> tuple[Float32Array, NDArray[np.int64]]:
    """Concatenates sequences.

    Args:
        sequences: Arrays [steps, features] of any lengths and any numeric dtype; or one array [batch, steps, features];
            or a Ragged, which is not copied.
        features: Size of a timestep.

    Returns:
        float32 [total_steps, features], and int64 [sequences + 1], the first row of each sequence and the end.

    Raises:
        InvalidRequestError: a sequence is not such an array, or holds a number that float32 can't represent as a finite
            one; the field is `sequences[INDEX]`.
    """
    if isinstance(sequences, Ragged):
        return _offsets_of(sequences, features)
    given = tuple(sequences)
    # Several arrays that need no conversion are checked and copied at once. A single one is not copied.
    if len(given) > 1 and (packed := pack(given, features)):
        return packed
    arrays = [check_sequence(each, features, f"sequences[{index}]") for index, each in enumerate(given)]
    offsets = np.array([0, *accumulate(map(len, arrays))], np.int64)
    if not arrays:
        return np.empty((0, features), np.float32), offsets
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays), offsets


def _offsets_of(ragged: Ragged, features: int) -> tuple[Float32Array, NDArray[np.int64]]:
    """Checks a Ragged; returns the result of `pack_sequences`."""
    values, lengths = ragged
    if values.dtype != np.float32 or values.ndim != 2 or values.shape[1] != features:
        problem = f"{values.dtype} {list(values.shape)}, float32 [total_steps, {features}] expected"
        raise InvalidRequestError(problem, "values")
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    if lengths.dtype.kind not in "iu" or (lengths < 1).any() or offsets[-1] != len(values):
        problem = f"integers of 1 or more expected, whose sum is the number of steps, {len(values)}"
        raise InvalidRequestError(problem, "lengths")
    # A finite sum proves that all terms are finite.
    with np.errstate(over="ignore", invalid="ignore"):
        finite = np.isfinite(values.sum())
    if not finite and (where := first_not_finite(values)):
        index = int(np.searchsorted(offsets, where[0], side="right")) - 1
        problem = f"step {where[0] - offsets[index]}, feature {where[1]} is not finite"
        raise InvalidRequestError(problem, f"sequences[{index}]")
    return np.ascontiguousarray(values), offsets


def check_sequence(values: ArrayLike, features: int, field: str) -> Float32Array:
    """Converts numbers to C-contiguous float32 [steps, features]; copies only if needed.

    Raises:
        InvalidRequestError: `values` is not such an array, has no steps, or holds a number that float32 can't represent
            as a finite one.
    """
    try:
        array = np.asarray(values)
    except ValueError:
        raise InvalidRequestError("rows of unequal lengths, an array [steps, features] expected", field) from None
    if array.dtype.kind not in "fiub":
        raise InvalidRequestError(f"dtype {array.dtype}, numbers expected", field)
    if array.ndim != 2 or array.shape[1] != features or not len(array):
        hint = "; one sequence of a batch is [steps, features]" if array.ndim == 1 else ""
        problem = f"shape {list(array.shape)}, [steps, {features}] with 1 step or more expected{hint}"
        raise InvalidRequestError(problem, field)
    with np.errstate(over="ignore"):
        checked = np.ascontiguousarray(array, np.float32)
    if where := first_not_finite(checked):
        raise InvalidRequestError(f"step {where[0]}, feature {where[1]} is not a finite float32", field)
    return checked
