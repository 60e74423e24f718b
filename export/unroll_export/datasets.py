"""Labelled sequences in three parts, train, validation and test, and how a list of sequences is split into them."""

import re
from collections.abc import Sequence as Rows
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from unroll_proto.sequences import Sequence, SequenceError

# A feature that varies by less than this share of its mean is float32 rounding, not a signal.
CONSTANT = 1e-6


@dataclass(frozen=True)
class Part:
    """Sequences with their classes.

    Attributes:
        sequences: float32 [steps, features] each, raw features.
        labels: int64 [sequences], indices into the data set's class labels.
    """

    sequences: list[Tensor]
    labels: Tensor

    def __len__(self) -> int:
        return len(self.sequences)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Picks sequences.

        Returns:
            x float32 [batch, time, features], 0 after a sequence's end; lengths and labels, int64 [batch].
        """
        chosen = [self.sequences[i] for i in indices.tolist()]
        lengths = torch.tensor([len(sequence) for sequence in chosen])
        return pad_sequence(chosen, batch_first=True), lengths, self.labels[indices]


@dataclass(frozen=True)
class Dataset:
    """Data for training, early stopping and evaluation.

    Attributes:
        name: A built-in data set's name, or the file's name without its path.
        sha256: SHA-256 of the source bytes; see the source that made it.
        class_labels: Class names by index, in natural order.
        feature_names: One per input feature.
        train: Training sequences, of 2 classes or more.
        validation: Sequences for early stopping; may be empty.
        test: Sequences for the final figures only; may be empty.
        parameters: Parameters of generated data; empty for other data.
    """

    name: str
    sha256: str
    class_labels: tuple[str, ...]
    feature_names: tuple[str, ...]
    train: Part
    validation: Part
    test: Part
    parameters: dict[str, int] = field(default_factory=dict)

    @property
    def longest_sequence(self) -> int:
        """Number of timesteps of the longest training sequence."""
        return max(len(sequence) for sequence in self.train.sequences)

    @property
    def median_length(self) -> int:
        """Number of timesteps of the median training sequence, the shorter of the middle two."""
        lengths = sorted(len(sequence) for sequence in self.train.sequences)
        return lengths[(len(lengths) - 1) // 2]

    def standardization(self) -> tuple[Tensor, Tensor]:
        """Computes mean and standard deviation of each feature over the timesteps of the training part.

        Returns:
            mean and std, float32 [features]; std is 1 for a constant feature.
        """
        steps = torch.cat(self.train.sequences).double()
        mean, std = steps.mean(0), steps.std(0, correction=0)
        std[std <= torch.clamp(CONSTANT * mean.abs(), min=torch.finfo(torch.float32).tiny)] = 1
        return mean.float(), std.float()


def natural_order(labels: set[str]) -> tuple[str, ...]:
    """Sorts labels as a reader expects: integers by value, other texts with the numbers inside them by value."""
    if all(re.fullmatch(r"[+-]?\d+", label) for label in labels):
        return tuple(sorted(labels, key=lambda label: (int(label), label)))
    # Splitting at numbers puts text at even places and numbers at odd ones, so that keys always compare.
    return tuple(
        sorted(
            labels,
            key=lambda label: (
                [int(part) if i % 2 else part for i, part in enumerate(re.split(r"(\d+)", label))],
                label,
            ),
        )
    )


def held_out(labels: Rows[str], fraction: float, seed: int) -> NDArray[np.bool_]:
    """Picks `fraction` of every class at random: at least one sequence, never the last one of a class.

    Returns:
        bool [sequences], true for the picked ones; all false if `fraction` is 0.
    """
    picked = np.zeros(len(labels), np.bool_)
    random = np.random.default_rng(seed)
    names = np.array(labels)
    for name in natural_order(set(labels)) if fraction else ():
        members = random.permutation(np.flatnonzero(names == name))
        picked[members[: min(max(1, round(fraction * len(members))), len(members) - 1)]] = True
    return picked


def split(rows: list[Sequence], validation: float, test: float, seed: int) -> dict[str, list[Sequence]]:
    """Splits sequences into the three parts.

    Sequences without a split are training sequences. If no sequence is of the test split, the share `test` of the
    training sequences is held out as one, and likewise the share `validation`. Both keep the class proportions.
    """
    parts: dict[str, list[Sequence]] = {"train": [], "validation": [], "test": []}
    for row in rows:
        parts[row.split or "train"].append(row)
    for seed_offset, (part, fraction) in enumerate((("test", test), ("validation", validation))):
        if not parts[part]:
            train = parts["train"]
            picked = held_out([row.label or "" for row in train], fraction, 2 * seed + seed_offset)
            parts[part] = [row for row, out in zip(train, picked, strict=True) if out]
            parts["train"] = [row for row, out in zip(train, picked, strict=True) if not out]
    return parts


def assemble(
    path: Path | str,
    rows: list[Sequence],
    *,
    name: str,
    sha256: str,
    features: tuple[str, ...] = (),
    feature_prefix: str = "feature",
    validation: float,
    test: float,
    seed: int,
) -> Dataset:
    """Makes a data set of the sequences `rows`, which were read from `path`.

    Raises:
        SequenceError: there are no training sequences, one has no label, all are of one class, or a class of the
            validation or test split has no training sequence.
    """
    if not rows:
        raise SequenceError(path, "holds no sequences")
    column = "labels" if str(path).lower().endswith(".npz") else "label"
    for row in rows:
        if row.label is None:
            raise SequenceError(path, "missing; training needs one for every sequence", row=row.row, column=column)
    parts = split(rows, validation, test, seed)
    train = parts["train"]
    if not train:
        raise SequenceError(path, "no sequence is of the train split", column="split")
    classes = natural_order({str(row.label) for row in train})
    if len(classes) == 1:
        what = f"{classes[0]!r} is the only class of the training sequences; 2 or more are needed"
        raise SequenceError(path, what, row=train[0].row, column=column)
    index = {label: i for i, label in enumerate(classes)}
    for row in (*parts["validation"], *parts["test"]):
        if row.label not in index:
            what = f"no training sequence is of class {row.label!r}"
            raise SequenceError(path, what, row=row.row, column=column)
    made = {part: _part(members, index) for part, members in parts.items()}
    features = features or tuple(f"{feature_prefix}_{i + 1}" for i in range(train[0].values.shape[1]))
    return Dataset(name, sha256, classes, features, made["train"], made["validation"], made["test"])


def _part(rows: list[Sequence], index: dict[str, int]) -> Part:
    labels = torch.tensor([index[str(row.label)] for row in rows], dtype=torch.int64)
    return Part([torch.from_numpy(row.values) for row in rows], labels)
