"""Warnings about failed training, with the cause that the figures indicate."""

import re

import pytest
import torch

from unroll_export.diagnosis import diagnose
from unroll_export.gradient_flow import GradientFlow
from unroll_export.metrics import Evaluation

LABELS = ("a", "b", "c")
STEADY = GradientFlow(9, [0.0] * 50, [99] * 50, [1.0])
VANISHING = GradientFlow(9, [-0.5 * step for step in range(50)], [99] * 50, [0.3])
EXPLODING = GradientFlow(9, [0.5 * step for step in range(50)], [99] * 50, [3.0])
ZERO = GradientFlow(9, [0.0] + [None] * 49, [99] * 50, [0.0])


def evaluation(*rows: list[int]) -> Evaluation:
    return Evaluation(0.5, torch.tensor(rows))


GOOD = evaluation([9, 1, 0], [0, 10, 0], [1, 0, 9])
GUESS = evaluation([4, 3, 3], [3, 4, 3], [3, 3, 4])
ONE_CLASS = evaluation([0, 10, 0], [0, 10, 0], [0, 10, 0])


def test_a_good_model_gets_no_warning() -> None:
    assert diagnose(GOOD, GOOD, VANISHING, 50, LABELS, gated=False) == []


@pytest.mark.parametrize(
    ("train", "flow", "gated", "cause"),
    [
        (
            GUESS,
            VANISHING,
            False,
            "gradients vanish; over the median length of 50 steps 1e-24 of them is left; try --cell gru",
        ),
        (GUESS, VANISHING, True, "gradients vanish; .* try shorter sequences"),
        (GUESS, ZERO, False, "gradients vanish; over the median length of 50 steps nothing of them is left"),
        (GUESS, EXPLODING, False, "gradients explode by 1e24 .* --lr or --clip"),
        (GUESS, STEADY, False, r"training ended before the model had learned \(accuracy 0.4000"),
        (GOOD, VANISHING, False, r"learned its training sequences \(accuracy 0.9333\).* --input-noise"),
        (evaluation([80, 20, 0], [9, 3, 0], [9, 1, 0]), STEADY, False, "--class-weights balanced"),
    ],
)
def test_the_cause_is_what_the_figures_point_at(train: Evaluation, flow: GradientFlow, gated: bool, cause: str) -> None:
    first, second = diagnose(GUESS, train, flow, 50, LABELS, gated)
    assert first == (
        "accuracy 0.4000 is no better than guessing: always predicting the most frequent class gives 0.3333"
    )
    assert second.startswith("likely cause: ")
    assert re.search(cause, second), second


def test_classes_that_are_never_predicted_are_named() -> None:
    warnings = diagnose(ONE_CLASS, ONE_CLASS, STEADY, 50, LABELS, gated=False)
    assert warnings[1] == "2 of 3 classes are never predicted: 'a', 'c'"
    two = evaluation([20, 0, 0], [0, 20, 0], [3, 3, 0])
    warnings = diagnose(two, two, STEADY, 50, LABELS, gated=False)
    assert [text.partition(":")[0] for text in warnings] == ["1 of 3 classes are never predicted", "likely cause"]
