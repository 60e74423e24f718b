"""The score: consistent counts, and readable tables for any number of classes."""

import random

import click
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from unroll_client import Classification
from unroll_client.cli.report import Score


def said(labels: tuple[str, ...], indices: list[int]) -> Classification:
    empty = np.empty((len(indices), 0), np.float32)
    return Classification([labels[index] for index in indices], np.array(indices, np.int64), empty, empty, None, "m", 1)


def printed(score: Score, width: int) -> str:
    return click.unstyle(score.table(width))


@given(st.integers(1, 6), st.lists(st.tuples(st.integers(-2, 5), st.integers(0, 5)), max_size=60), st.integers(0, 60))
def test_counts(classes: int, pairs: list[tuple[int, int]], at: int) -> None:
    labels = tuple(f"c{index}" for index in range(classes))
    pairs = [(min(true, classes - 1), min(guess, classes - 1)) for true, guess in pairs]
    names = {-2: None, -1: "never seen"} | dict(enumerate(labels))
    score = Score(labels)
    for part in (pairs[:at], pairs[at:]):
        score.add([names[true] for true, _ in part], said(labels, [guess for _, guess in part]))
    assert score.unlabelled == sum(true == -2 for true, _ in pairs)
    assert score.labelled == sum(true != -2 for true, _ in pairs)
    assert score.correct == sum(true == guess for true, guess in pairs)
    for true in range(classes):
        for guess in range(classes):
            assert score.counts[true, guess] == pairs.count((true, guess))
    if score.labelled:
        assert f"accuracy {score.correct / score.labelled:.4f}: " in score.summary()
        printed(score, 80)


def test_summary_names_what_it_left_out() -> None:
    score = Score(("a", "b"))
    score.add(["a", "b", None, "z"], said(("a", "b"), [0, 0, 1, 1]))
    assert score.summary() == (
        "accuracy 0.3333: 1 of 3 sequences, 1 without a label, 1 of a class that the model doesn't know"
    )
    assert printed(score, 80).splitlines()[-1].split() == ["(unknown)", ".", "1"]


def test_a_matrix() -> None:
    score = Score(("[red]", "b"))
    score.add(["[red]", "[red]", "b"], said(("[red]", "b"), [0, 1, 1]))
    lines = [line.split() for line in printed(score, 80).splitlines()]
    assert lines == [["true", "\\", "said", "[red]", "b"], ["[red]", "1", "1"], ["b", ".", "1"]]


@pytest.mark.parametrize(("classes", "width"), [(50, 200), (9, 60), (400, 80)])
def test_many_classes_are_a_line_each(classes: int, width: int) -> None:
    labels = tuple(f"class {index}" for index in range(classes))
    score = Score(labels)
    rng = random.Random(0)  # noqa: S311 (a test)
    true = [rng.randrange(classes) for _ in range(2000)]
    score.add([labels[index] for index in true], said(labels, [max(index - 1, 0) for index in true]))
    text = printed(score, width)
    assert all(len(line) <= width for line in text.splitlines())
    assert "precision" in text
    assert len(text.splitlines()) > classes


def test_a_line_of_a_class() -> None:
    labels = tuple(f"c{index}" for index in range(20))
    score = Score(labels)
    score.add(["c3"] * 4 + ["c5"], said(labels, [3, 3, 7, 7, 3]))
    lines = {line.split()[0]: line.split()[1:] for line in printed(score, 80).splitlines()}
    assert lines["c3"] == ["4", "0.5000", "0.6667", "c7", "(2)"]
    assert lines["c5"] == ["1", "0.0000", "-", "c3", "(1)"]
    assert lines["c0"] == ["0", "-", "-", "-"]
