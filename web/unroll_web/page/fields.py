"""Fields of a request, checked."""

import math
from collections.abc import Mapping
from typing import Any


def text(request: Mapping[str, Any], field: str, most: int = 256) -> str:
    """Returns a string of at most `most` characters; raises ValueError otherwise."""
    value = request.get(field)
    if not isinstance(value, str) or len(value) > most:
        raise ValueError(f"{field}: a string of at most {most} characters expected")
    return value


def integer(request: Mapping[str, Any], field: str, default: int | None = None) -> int:
    """Returns a whole number of at most 32 bits, or the default if it is missing; raises ValueError otherwise."""
    value = request.get(field, default)
    if isinstance(value, bool) or not isinstance(value, int) or not -1 <= value < 2**32:
        raise ValueError(f"{field}: a whole number expected")
    return value


def number(request: Mapping[str, Any], field: str, default: float, most: float = 1e30) -> float:
    """Returns a finite number of a size up to `most`, or the default if it is missing; raises ValueError otherwise."""
    value = request.get(field, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or abs(value) > most:
        raise ValueError(f"{field}: a number of at most {most:g} expected")
    return float(value)
