"""Pauses before retries: exponential, with jitter against clients in step."""

import random

_FIRST = 0.05
_LONGEST = 2.0


def backoff(failures: int) -> float:
    """Returns the seconds to wait after `failures` failures in a row, 1 or more."""
    longest = min(_FIRST * 2.0 ** min(failures, 30), _LONGEST)
    return random.uniform(longest / 2, longest)  # noqa: S311 (nothing is kept secret by it)
