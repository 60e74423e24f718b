"""Warnings about a failed training run, with the likely cause and possible remedies."""

import math
from collections.abc import Sequence

from unroll_export.gradient_flow import GradientFlow
from unroll_export.metrics import Evaluation

GUESSING = 2.0
"""Standard errors by which an accuracy must exceed that of the most frequent class to be better than guessing."""
VANISHED = 4.0
"""Powers of ten by which a gradient shrinks on its way back before it counts as vanished."""
RARE = 2
"""Ratio of the most frequent class to the rarest one from which --class-weights helps."""
FITTED = 0.9
"""Training accuracy from which a model has learned its training sequences."""


def diagnose(
    judged: Evaluation,
    train: Evaluation,
    flow: GradientFlow,
    median_length: int,
    class_labels: Sequence[str],
    gated: bool,
) -> list[str]:
    """Finds problems that a user should know before using the model.

    Args:
        judged: The evaluation that the run is judged by.
        train: The evaluation on the training sequences.
        flow: Gradient flow of the kept weights.
        median_length: Timesteps of the median training sequence.
        class_labels: Class names by index.
        gated: True for LSTM and GRU.

    Returns:
        One or two sentences each: finding, likely cause, remedy. Empty if nothing is wrong.
    """
    count = int(judged.confusion.sum())
    error = math.sqrt(judged.majority * (1 - judged.majority) / count)
    guessing = judged.accuracy <= judged.majority + GUESSING * error
    predicted, true = judged.confusion.sum(0), judged.confusion.sum(1)
    never = [label for label, p, t in zip(class_labels, predicted, true, strict=True) if t and not p]
    if not guessing and not never:
        return []
    findings = []
    if guessing:
        findings.append(
            f"accuracy {judged.accuracy:.4f} is no better than guessing: always predicting the most frequent class "
            f"gives {judged.majority:.4f}"
        )
    if never:
        shown = ", ".join(repr(label) for label in never[:5]) + (", ..." if len(never) > 5 else "")
        findings.append(f"{len(never)} of {len(class_labels)} classes are never predicted: {shown}")
    counts = train.confusion.sum(1)
    return [*findings, _cause(train, flow, median_length, gated, rare=bool(counts.max() >= RARE * counts.min()))]


def _cause(train: Evaluation, flow: GradientFlow, median_length: int, gated: bool, rare: bool) -> str:
    if train.accuracy >= FITTED:
        return (
            f"likely cause: the model has learned its training sequences (accuracy {train.accuracy:.4f}) and nothing "
            "general; try more of them, --input-noise, --weight-decay or a smaller --hidden-size"
        )
    decay = flow.decay(median_length - 1)
    if decay is None or decay > VANISHED:
        lost = "nothing" if decay is None else f"1e-{decay:.0f}"
        cell = "shorter sequences, or features that summarize them" if gated else "--cell gru or --cell lstm"
        return (
            f"likely cause: gradients vanish; over the median length of {median_length} steps {lost} of them is left; "
            f"try {cell}"
        )
    if rare:
        return "likely cause: the classes differ in frequency; try --class-weights balanced"
    if decay < -VANISHED:
        return (
            f"likely cause: gradients explode by 1e{-decay:.0f} over the median length of {median_length} steps; "
            "try a lower --lr or --clip"
        )
    return (
        f"likely cause: training ended before the model had learned (accuracy {train.accuracy:.4f} on the training "
        "sequences); try more --epochs, another --lr, less --input-noise or another --cell"
    )
