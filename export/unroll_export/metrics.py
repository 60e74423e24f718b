"""Loss of a classifier's logits, and figures of its predictions: accuracy, confusion matrix, per-class figures."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from unroll_export.datasets import Part
from unroll_export.model import RecurrentClassifier

# Sequences of one evaluation call; bounds the memory for padding.
EVALUATION_BATCH = 256


def loss_of(logits: Tensor, labels: Tensor, reduction: str = "mean", weights: Tensor | None = None) -> Tensor:
    """Computes the cross-entropy; for a single logit, the binary cross-entropy with class 1 as the positive one.

    Args:
        logits: float [batch, output_size].
        labels: int64 [batch], class indices.
        reduction: As in torch: "mean" (weighted by `weights`), "sum" or "none".
        weights: Weight of each class in the loss, float [classes]; None for 1 each.
    """
    if logits.shape[1] > 1:
        return F.cross_entropy(logits, labels, weights, reduction=reduction)
    loss = F.binary_cross_entropy_with_logits(logits[:, 0], labels.to(logits.dtype), reduction="none")
    each = torch.ones_like(loss) if weights is None else weights[labels]
    loss = loss * each
    if reduction == "none":
        return loss
    return loss.sum() / each.sum() if reduction == "mean" else loss.sum()


def balanced_weights(labels: Tensor, classes: int) -> Tensor:
    """Weights each class by the inverse of its frequency: samples / (classes * samples of the class) (King, Zeng 2001).

    Args:
        labels: int64 [sequences], class indices.
        classes: Number of classes; one without a sequence gets weight 0.

    Returns:
        float32 [classes], mean 1 over the sequences.
    """
    counts = torch.bincount(labels, minlength=classes)
    weights = len(labels) / ((counts > 0).sum() * counts)
    return torch.where(counts > 0, weights, 0.0)


def predict(logits: Tensor) -> Tensor:
    """Returns the most probable class of each row of logits [batch, output_size]: int64 [batch]."""
    return (logits[:, 0] > 0).long() if logits.shape[1] == 1 else logits.argmax(1)


@dataclass(frozen=True)
class Evaluation:
    """Figures of a model on a part of the data.

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

    @property
    def majority(self) -> float:
        """Accuracy of always predicting the most frequent true class."""
        return float(self.confusion.sum(1).max()) / float(self.confusion.sum())

    @property
    def macro_f1(self) -> float:
        """Mean F1 of the classes that have sequences."""
        supported = self.confusion.sum(1) > 0
        hits = self.confusion.diagonal().double()
        f1 = 2 * hits / (self.confusion.sum(0) + self.confusion.sum(1)).clamp(min=1)
        return float(f1[supported].mean())

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


@torch.no_grad()
def evaluate(model: RecurrentClassifier[Any], part: Part, classes: int) -> Evaluation:
    """Runs the model over all sequences of a part, which must not be empty."""
    # Sequences of similar lengths together, which saves padding.
    order = torch.tensor([len(sequence) for sequence in part.sequences]).argsort(stable=True)
    total = 0.0
    confusion = torch.zeros(classes, classes, dtype=torch.int64)
    for start in range(0, len(order), EVALUATION_BATCH):
        x, lengths, labels = part.batch(order[start : start + EVALUATION_BATCH])
        logits = model(x, lengths)
        total += float(loss_of(logits, labels, reduction="sum"))
        confusion.index_put_((labels, predict(logits)), torch.ones_like(labels), accumulate=True)
    return Evaluation(total / len(part), confusion)
