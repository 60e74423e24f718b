"""Accuracy and confusion matrix of a labelled file; text made safe for a terminal."""

from collections.abc import Sequence
from itertools import repeat
from typing import Any

import click
import numpy as np

from unroll_client._types import Classification
from unroll_client.cli.tables import table

# A wider matrix can't be taken in at a glance.
MATRIX_CLASSES = 16


def printable(text: str) -> str:
    """Returns the text as one line for a terminal: line ends and control characters are escaped."""
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


class Score:
    """Counts of predicted classes by true class.

    Attributes:
        counts: int64 [classes + 1, classes]: sequences by true and by predicted class. The last row holds those
            whose true class the model doesn't know.
        unlabelled: Sequences without a label in the file.
        said: int64 [classes], sequences by predicted class.
    """

    def __init__(self, class_labels: tuple[str, ...]) -> None:
        self._labels = tuple(map(printable, class_labels))
        self._index: dict[str | None, int] = {None: -1, **{label: index for index, label in enumerate(class_labels)}}
        self.counts = np.zeros((len(class_labels) + 1, len(class_labels)), np.int64)
        self.unlabelled = 0
        self.said = np.zeros(len(class_labels), np.int64)

    def add(self, labels: Sequence[str | None], result: Classification) -> None:
        """Counts a batch: labels [n] of the file, None for a sequence without one."""
        said = result.label_indices
        self.said += np.bincount(said, minlength=len(self.said))
        unknown = repeat(len(self._labels))
        true = np.fromiter(map(self._index.get, labels, unknown), np.int64, len(labels))
        known = true >= 0
        self.unlabelled += int(len(labels) - known.sum())
        np.add.at(self.counts, (true[known], said[known]), 1)

    def state(self) -> dict[str, Any]:
        """Returns the counts as JSON can hold them."""
        return {"counts": self.counts.tolist(), "said": self.said.tolist(), "unlabelled": self.unlabelled}

    def restore(self, state: dict[str, Any]) -> None:
        """Takes counts that `state` returned."""
        self.counts = np.array(state["counts"], np.int64).reshape(self.counts.shape)
        self.said = np.array(state["said"], np.int64)
        self.unlabelled = int(state["unlabelled"])

    def classes(self) -> str:
        """Returns the predicted classes in one line, the most frequent first."""
        order = [index for index in np.argsort(-self.said, kind="stable").tolist() if self.said[index]]
        shown = [f"{self._labels[index]} {self.said[index]}" for index in order[:MATRIX_CLASSES]]
        return "labels: " + ", ".join([*shown, *(["..."] if len(order) > MATRIX_CLASSES else [])])

    @property
    def labelled(self) -> int:
        """Number of sequences counted."""
        return int(self.counts.sum())

    @property
    def correct(self) -> int:
        """Number of sequences classified correctly."""
        return int(np.trace(self.counts[:-1]))

    def summary(self) -> str:
        """Accuracy in one line."""
        line = f"accuracy {self.correct / self.labelled:.4f}: {self.correct} of {self.labelled} sequences"
        if self.unlabelled:
            line += f", {self.unlabelled} without a label"
        if unknown := int(self.counts[-1].sum()):
            line += f", {unknown} of a class that the model doesn't know"
        return line

    def table(self, width: int) -> str:
        """Returns the confusion matrix; a line per class if the matrix is wider than `width` characters."""
        labels = [*self._labels, "(unknown)"] if self.counts[-1].any() else list(self._labels)
        cell = max(len(label) for label in (*self._labels, str(self.counts.max())))
        name = max(len(label) for label in (*labels, "true \\ said"))
        if len(self._labels) > MATRIX_CLASSES or name + len(self._labels) * (cell + 2) > width:
            return self._by_class()
        rows = [
            [label, *(_count(count, said == index) for said, count in enumerate(self.counts[index].tolist()))]
            for index, label in enumerate(labels)
        ]
        return table(["true \\ said", *self._labels], rows, right=self._labels)

    def _by_class(self) -> str:
        said = self.counts.sum(axis=0)
        rows = []
        for index, label in enumerate(self._labels):
            row = self.counts[index]
            right, total = int(row[index]), int(row.sum())
            others = row.copy()
            others[index] = 0
            worst = int(others.argmax())
            rows.append(
                (
                    label,
                    str(total),
                    f"{right / total:.4f}" if total else "-",
                    f"{right / said[index]:.4f}" if said[index] else "-",
                    f"{self._labels[worst]} ({others[worst]})" if others[worst] else "-",
                )
            )
        numbers = ("sequences", "recall", "precision")
        return table(("class", *numbers, "most often taken for"), rows, right=numbers)


def _count(count: int, is_right: bool) -> str:
    if is_right:
        return click.style(str(count), bold=True)
    return str(count) if count else click.style(".", dim=True)
