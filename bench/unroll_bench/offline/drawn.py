"""The sequences that batch inference is measured with."""

from collections.abc import Iterator

import numpy as np

from unroll_bench.contest.contestants import FEATURES
from unroll_proto.sequences import Sequence

SHORTEST, LONGEST = 7, 29
"""Steps of the sequences of JapaneseVowels."""


def sequences(count: int) -> Iterator[Sequence]:
    """Draws sequences of 7 to 29 steps, as long as those of JapaneseVowels."""
    rng = np.random.default_rng(0)
    for index, steps in enumerate(rng.integers(SHORTEST, LONGEST + 1, count).tolist()):
        yield Sequence(str(index), rng.standard_normal((steps, FEATURES), dtype=np.float32))
