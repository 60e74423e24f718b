"""Messages of the WebSocket: a JSON header, followed by arrays as float32 bits.

A frame is the header's length (uint32), the header in UTF-8, padded with spaces so that what follows is aligned to 4
bytes, and the arrays, little-endian float32. The header's `arrays` lists [name, shape] in their order.
"""

import base64
import binascii
import json
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Float32Array = NDArray[np.float32]


def frame(header: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]] | None = None) -> bytes:
    """Encodes a header and its arrays; arrays of other dtypes are converted to float32."""
    packed = {name: np.ascontiguousarray(array, dtype="<f4") for name, array in (arrays or {}).items()}
    shapes = [[name, list(array.shape)] for name, array in packed.items()]
    text = json.dumps({**header, "arrays": shapes}, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()
    text += b" " * (-len(text) % 4)
    return b"".join([struct.pack("<I", len(text)), text, *(array.tobytes() for array in packed.values())])


def unpack_values(field: str, text: object, width: int, most: int) -> Float32Array:
    """Decodes base64 of float32 timesteps.

    Args:
        field: Name of the field, for errors.
        text: The base64.
        width: Features of a timestep.
        most: Most timesteps.

    Returns:
        [steps, width], finite.

    Raises:
        ValueError: the text is not that.
    """
    if not isinstance(text, str):
        raise ValueError(f"{field}: base64 of float32 expected")
    try:
        data = base64.b64decode(text, validate=True)
    except binascii.Error:
        raise ValueError(f"{field}: not base64") from None
    if not width or len(data) % (4 * width):
        raise ValueError(f"{field}: {len(data)} bytes, a multiple of {4 * width} expected: {width} features a step")
    values = np.frombuffer(data, "<f4").reshape(-1, width)
    if len(values) > most:
        raise ValueError(f"{field}: {len(values)} steps, {most} at most")
    if not np.isfinite(values).all():
        raise ValueError(f"{field}: a finite number expected everywhere")
    return values


def pack_values(values: Float32Array) -> str:
    """Encodes timesteps as `unpack_values` reads them."""
    return base64.b64encode(np.ascontiguousarray(values, dtype="<f4").tobytes()).decode()
