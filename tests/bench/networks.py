"""The two networks of the issue, exported with proof; sequences for them; what eager PyTorch says of these."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from support.exports import run_of
from support.models import random_network

from unroll_engine.models.spec import Float32Array
from unroll_export import SimpleRNN
from unroll_export.exporting import export_run

# Every process of the benchmark is pinned to one core, where a second thread of torch's only spins.
torch.set_num_threads(1)

SMALL = "small"
LARGE = "large"
SIZES = {SMALL: (12, 128, 9), LARGE: (64, 512, 16)}
"""Features, hidden units, classes."""
VERSION = 1
LONGEST = 120
SHORTEST = 5
EVEN = 29
"""Steps of every sequence where all are alike: the longest of JapaneseVowels."""


@cache
def network(name: str) -> SimpleRNN:
    """Random weights, the same in every process and every run."""
    return random_network(*SIZES[name])


def export(name: str, root: Path) -> Path:
    """Writes the model repository `root`/`name` that holds one network, by the real exporter; returns its folder."""
    repository = root / name
    if not repository.exists():
        export_run(run_of(network(name), longest_sequence=LONGEST), repository / name)
    return repository


def even(name: str, count: int, steps: int = EVEN, seed: int = 0) -> list[Float32Array]:
    """Sequences [steps, features], standard normal."""
    rng = np.random.default_rng(seed)
    return list(rng.standard_normal((count, steps, SIZES[name][0]), dtype=np.float32))


def ragged(name: str, count: int, seed: int = 0) -> list[Float32Array]:
    """Sequences of uniform lengths 5 to 120; `count` is best a multiple of 116, for then the mean is exact."""
    rng = np.random.default_rng(seed)
    lengths = np.resize(np.arange(SHORTEST, LONGEST + 1), count)
    rng.shuffle(lengths)
    return [rng.standard_normal((steps, SIZES[name][0]), dtype=np.float32) for steps in lengths.tolist()]


def eager(name: str, sequences: Sequence[Float32Array]) -> Float32Array:
    """Logits [sequences, classes] at each one's last step, by eager PyTorch, sequences of one length together."""
    logits = np.empty((len(sequences), SIZES[name][2]), np.float32)
    lengths = np.array([len(sequence) for sequence in sequences])
    for steps in set(lengths.tolist()):
        where = np.flatnonzero(lengths == steps).tolist()
        batch = torch.from_numpy(np.stack([sequences[index] for index in where]))
        with torch.inference_mode():
            logits[where] = network(name).unroll(batch)[0][:, -1].numpy()
    return logits
