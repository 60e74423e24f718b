"""Loss of a classifier's logits, and the figures that judge its predictions: accuracy, confusion, per-class."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from unroll_export.datasets import Part
from unroll_export.model import SimpleRNN

# Sequences of one evaluation call; bounds the memory that padding takes.
EVALUATION_BATCH = 256


def loss_of(logits: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
    """Cross-entropy of the classes; of a single logit, binary cross-entropy with class 1 as the positive one.

    Args:
        logits: float [batch, output_size].
        labels: int64 [batch], class indices.
        reduction: As in torch: "mean", "sum" or "none".
    """
    if logits.shape[1] == 1:
        return F.binary_cross_entropy_with_logits(logits[:, 0], labels.to(logits.dtype), reduction=reduction)
    return F.cross_entropy(logits, labels, reduction=reduction)


def predict(logits: Tensor) -> Tensor:
    """Most probable class of each row of logits [batch, output_size]: int64 [batch]."""
    return (logits[:, 0] > 0).long() if logits.shape[1] == 1 else logits.argmax(1)


@dataclass(frozen=True)
class Evaluation:
    """How a model does on a part of the data.

    Attributes:
        loss: Mean over the sequences.
        confusion: int64 [classes, classes]; rows are true classes, columns predicted ones.
    """

    loss: float
    confusion: Tensor

    @property
    def accuracy(self) -> float:
        """Share of the sequences classified correctly."""
        return float(self.confusion.trace()) / float(self.confusion.sum())

    def per_class(self, class_labels: tuple[str, ...]) -> list[dict[str, Any]]:
        """Precision, recall, F1 and support of each class; a figure whose denominator is 0 is 0."""
        figures = []
        for i, label in enumerate(class_labels):
            hits = int(self.confusion[i, i])
            support, predicted = int(self.confusion[i].sum()), int(self.confusion[:, i].sum())
            figures.append(
                {
                    "label": label,
                    "precision": hits / predicted if predicted else 0.0,
                    "recall": hits / support if support else 0.0,
                    "f1": 2 * hits / (support + predicted) if support + predicted else 0.0,
                    "support": support,
                }
            )
        return figures

    def as_json(self, class_labels: tuple[str, ...]) -> dict[str, Any]:
        """The evaluation as it stands in `summary.json`."""
        return {
            "sequences": int(self.confusion.sum()),
            "loss": self.loss,
            "accuracy": self.accuracy,
            "confusion_matrix": self.confusion.tolist(),
            "per_class": self.per_class(class_labels),
        }


@torch.no_grad()
def evaluate(model: SimpleRNN, part: Part, classes: int) -> Evaluation:
    """Runs the model over all sequences of a part, which is not empty."""
    # Sequences of like lengths together: little padding.
    order = torch.tensor([len(sequence) for sequence in part.sequences]).argsort(stable=True)
    total = 0.0
    confusion = torch.zeros(classes, classes, dtype=torch.int64)
    for start in range(0, len(order), EVALUATION_BATCH):
        x, lengths, labels = part.batch(order[start : start + EVALUATION_BATCH])
        logits = model(x, lengths)
        total += float(loss_of(logits, labels, reduction="sum"))
        confusion.index_put_((labels, predict(logits)), torch.ones_like(labels), accumulate=True)
    return Evaluation(total / len(part), confusion)
