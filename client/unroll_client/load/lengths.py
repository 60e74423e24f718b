"""Lengths of made-up sequences, from a few characters: "29", "5..120", "normal:60,20"."""

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_NUMBER = r"\d+(?:\.\d+)?"


@dataclass(frozen=True, slots=True)
class Lengths:
    """A distribution of lengths in timesteps.

    Attributes:
        text: How it was written.
        draw: Gives n of them: int64 [n], 1 or more.
        most: The longest there can be; None where nothing bounds it.
    """

    text: str
    draw: Callable[[np.random.Generator, int], NDArray[np.int64]]
    most: int | None


def parse_lengths(text: str) -> Lengths:
    """Reads "N" (all the same), "N..M" (uniform, both included) or "normal:MEAN,DEVIATION" (rounded, 1 or more).

    Raises:
        ValueError: it is none of them.
    """
    if match := re.fullmatch(r"(\d+)(?:\.\.(\d+))?", text):
        least, most = int(match[1]), int(match[2] or match[1])
        if 1 <= least <= most:
            return Lengths(text, lambda generator, n: generator.integers(least, most, n, endpoint=True), most)
    elif match := re.fullmatch(rf"normal:({_NUMBER}),({_NUMBER})", text):
        mean, deviation = float(match[1]), float(match[2])
        if mean >= 1:

            def normal(generator: np.random.Generator, n: int) -> NDArray[np.int64]:
                return np.maximum(np.rint(generator.normal(mean, deviation, n)), 1).astype(np.int64)

            return Lengths(text, normal, None)
    raise ValueError(f'--lengths: {text}: "29", "5..120" or "normal:60,20" expected, of 1 step or more')
