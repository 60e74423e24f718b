"""Lengths of random sequences: "29", or "5..120"."""

import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Lengths:
    """A uniform distribution of lengths in timesteps.

    Attributes:
        least: The shortest, 1 or more.
        most: The longest.
    """

    least: int
    most: int

    @classmethod
    def parse(cls, text: str) -> "Lengths":
        """Reads "N" (all the same) or "N..M" (uniform, both included).

        Raises:
            ValueError: it is neither.
        """
        match = re.fullmatch(r"(\d+)(?:\.\.(\d+))?", text)
        lengths = cls(int(match[1]), int(match[2] or match[1])) if match else None
        if lengths is None or not 1 <= lengths.least <= lengths.most:
            raise ValueError(f'--lengths: {text}: "29" or "5..120" expected, of 1 step or more')
        return lengths

    def draw(self, generator: np.random.Generator, count: int) -> NDArray[np.int64]:
        """Draws lengths, int64 [count]."""
        return generator.integers(self.least, self.most, count, endpoint=True)
