"""Arrays of float32 in JSON: as numbers, or as their little-endian bytes in hex or base64."""

import base64
import binascii
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from unroll_web.problems import Problem

FORMATS = ("numbers", "hex", "base64")
_FLOAT32 = np.dtype("<f4")


def encode(array: NDArray[np.float32], form: str) -> Any:
    """Converts an array to JSON: nested lists, or an object with `shape` and the bytes.

    Numbers are written as float64 with the same value, so that readers of either width get the same bits.

    Args:
        array: Of any shape.
        form: One of FORMATS.

    Raises:
        Problem: a value is not finite, which JSON's numbers can't be.
    """
    if form == "numbers":
        if not np.isfinite(array).all():
            raise Problem(
                400, "floats: a result is not finite, which JSON can't hold as a number; ask for hex or base64"
            )
        return array.tolist()
    data = array.astype(_FLOAT32, copy=False).tobytes()
    text = data.hex() if form == "hex" else base64.b64encode(data).decode()
    return {"shape": list(array.shape), form: text}


def decode(value: Any, field: str) -> ArrayLike:
    """Converts JSON as of `encode` to an array; numbers are left to the client library's checks.

    Raises:
        Problem: the bytes can't be read, or do not fit the shape.
    """
    if not isinstance(value, dict):
        if not isinstance(value, list):
            raise Problem.at(field, "a list of timesteps, or an object with shape and hex or base64, expected")
        return value
    form = next((form for form in FORMATS[1:] if form in value), "")
    if not form or value.keys() != {"shape", form}:
        raise Problem.at(field, "an object with shape, and hex or base64, expected")
    shape, text = value["shape"], value[form]
    if (
        not isinstance(shape, list)
        or len(shape) != 2
        or not all(type(size) is int and 0 < size < 2**31 for size in shape)
    ):
        raise Problem.at(f"{field}.shape", "[steps, features] expected")
    try:
        data = bytes.fromhex(text) if form == "hex" else base64.b64decode(text, validate=True)
    except (TypeError, ValueError, binascii.Error):
        raise Problem.at(f"{field}.{form}", f"{form} digits of little-endian float32 expected") from None
    expected = shape[0] * shape[1] * _FLOAT32.itemsize
    if len(data) != expected:
        raise Problem.at(f"{field}.{form}", f"{len(data)} bytes, {expected} expected for {shape}")
    return np.frombuffer(data, _FLOAT32).reshape(shape).astype(np.float32)
