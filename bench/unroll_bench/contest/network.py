"""The network of the benchmark, exported with proof; its input sequences; its answers by eager PyTorch."""

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from unroll_bench.contest.contestants import CLASSES, FEATURES, HIDDEN, MODEL
from unroll_engine.models.spec import Float32Array
from unroll_export import SimpleRNN
from unroll_export.exporting import export_run
from unroll_export.model import RecurrentClassifier
from unroll_export.runs import TrainedRun

# Every process of the benchmark is pinned to one core, on which a second thread of torch would only spin.
torch.set_num_threads(1)

Network = TypeVar("Network", bound=RecurrentClassifier[Any])
SHORTEST, LONGEST = 5, 120
EVEN = 29
"""Steps of sequences of equal length: the longest of JapaneseVowels."""
TOLERANCE = 1e-5
"""Largest difference between an answer and eager PyTorch."""


class WrongAnswerError(Exception):
    """A contestant refused a request, or its answer differs from eager PyTorch's."""


def hold(name: str, logits: Float32Array, expected: Float32Array) -> None:
    """Compares logits with those of eager PyTorch.

    Raises:
        WrongAnswerError: the shape differs, or values differ by more than TOLERANCE. The message begins with `name`.
    """
    if logits.shape != expected.shape:
        raise WrongAnswerError(f"{name}: logits {logits.shape}, {expected.shape} expected")
    difference = float(np.abs(logits - expected).max())
    if not difference <= TOLERANCE:
        raise WrongAnswerError(f"{name}: {difference:.1e} away from eager PyTorch, {TOLERANCE:.0e} allowed")


def random_network(build: Callable[[], Network]) -> Network:
    """Builds a network with random weights, the same in every process and every run."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = build()
        made.mean.uniform_(-1, 1)
        made.std.uniform_(0.5, 2)
    return made.eval()


@cache
def network() -> SimpleRNN:
    """Returns the network that every server serves."""
    return random_network(lambda: SimpleRNN(FEATURES, HIDDEN, CLASSES))


def export(root: Path) -> Path:
    """Exports the network into a model repository, unless it exists; returns its folder."""
    repository = root / "models"
    if not repository.exists():
        training = {"data": "none", "data_sha256": "", "seed": 0, "epochs": 0, "training_sequences": 0}
        classes, features = tuple(map("class {}".format, range(CLASSES))), tuple(map("x{}".format, range(FEATURES)))
        run = TrainedRun(network(), classes, features, {**training, "longest_sequence": LONGEST})
        export_run(run, repository / MODEL)
    return repository


def even(count: int, steps: int = EVEN) -> list[Float32Array]:
    """Draws standard normal sequences [steps, features]."""
    return list(np.random.default_rng(0).standard_normal((count, steps, FEATURES), dtype=np.float32))


def ragged(count: int) -> list[Float32Array]:
    """Draws sequences of uniform lengths 5 to 120; the mean is exact if `count` is a multiple of 116."""
    rng = np.random.default_rng(0)
    lengths = np.resize(np.arange(SHORTEST, LONGEST + 1), count)
    rng.shuffle(lengths)
    return [rng.standard_normal((steps, FEATURES), dtype=np.float32) for steps in lengths.tolist()]


def eager(sequences: Sequence[Float32Array]) -> Float32Array:
    """Computes logits [sequences, classes] of last steps by eager PyTorch, sequences of one length together."""
    logits = np.empty((len(sequences), CLASSES), np.float32)
    lengths = np.array([len(sequence) for sequence in sequences])
    for steps in set(lengths.tolist()):
        where = np.flatnonzero(lengths == steps).tolist()
        batch = torch.from_numpy(np.stack([sequences[index] for index in where]))
        with torch.inference_mode():
            logits[where] = network().unroll(batch)[0][:, -1].numpy()
    return logits
