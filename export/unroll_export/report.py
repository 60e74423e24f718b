"""Pictures of training runs: one run in four panels, or several runs side by side."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from unroll_export.fonts import fonts_for
from unroll_export.model import CELLS
from unroll_export.runs import SUMMARY, RunError, load_summary, replaced

TRAIN, VALIDATION, FINAL = "#1f6fb4", "#e07a1f", "#222222"
RUNS = ("#1f6fb4", "#e07a1f", "#2a8c4a", "#8a4fb0", "#b03a4a", "#7a7a7a")
NUMBERED, NAMED = 20, 30
"""Most classes of a confusion matrix with numbers and names."""
FEW = 8
"""Least sequences of a mean gradient norm that is drawn."""
VANISHED = 1e-4
"""Share of the gradient below which it counts as vanished."""


def write_report(runs: Sequence[Path], output: Path) -> None:
    """Draws the runs in the folders `runs` as the PNG `output`, from their summaries.

    Args:
        runs: One folder to draw a run in detail; 2 to 6 to compare runs.
        output: File to write.

    Raises:
        RunError: a folder holds no finished run, or its summary is incomplete.
    """
    summaries = [(run.resolve().name, load_summary(run)) for run in runs]
    try:
        texts = [title for title, _ in summaries] + [text for _, each in summaries for text in _texts(each)]
        with fonts_for(texts) as replacements:
            if len(summaries) == 1:
                figure = draw_run(*summaries[0], replacements)
            else:
                figure = draw_comparison(summaries, replacements)
            output.parent.mkdir(parents=True, exist_ok=True)
            with replaced(output) as partial:
                figure.savefig(partial, format="png")
    except (KeyError, IndexError, TypeError) as error:
        files = ", ".join(str(run / SUMMARY) for run in runs)
        raise RunError(f"{files}: missing or of the wrong type: {error}") from error


def draw_run(title: str, summary: dict[str, Any], replacements: Mapping[int, str]) -> Figure:
    """Draws loss, accuracy, confusion matrices and gradient flow of one run.

    Args:
        title: Name of the run.
        summary: Its `summary.json`.
        replacements: Replacements of characters that can't be drawn; see fonts_for.
    """
    figure = Figure(figsize=(12, 13), dpi=120, layout="constrained")
    panels = figure.subplot_mosaic([["loss", "accuracy"], ["counts", "shares"], ["flow", "flow"]])
    cell = CELLS[summary["architecture"]].upper()
    heading = (
        f"{title}: {summary['data']}\n"
        f"{cell}, hidden size {summary['hidden_size']} x {summary['num_layers']}, seed {summary['seed']}: "
        f"{summary['judged_on']} accuracy {summary['accuracy']:.4f} "
        f"(most frequent class {summary['majority_accuracy']:.4f}), macro-F1 {summary['macro_f1']:.4f}"
    )
    figure.suptitle(heading.translate(replacements), fontsize=13)
    labels = [str(label).translate(replacements) for label in summary["class_labels"]]
    _curves(panels["loss"], summary, "loss")
    panels["loss"].set_yscale("log")
    _curves(panels["accuracy"], summary, "accuracy")
    panels["accuracy"].set_ylim(-0.02, 1.02)
    matrix = np.array(summary["confusion_matrix"])
    totals = matrix.sum(axis=1, keepdims=True)
    split = summary["judged_on"]
    _confusion(panels["counts"], matrix, labels, "{:d}", f"Confusion, {split} split: sequences")
    _confusion(panels["shares"], matrix / np.maximum(totals, 1), labels, "{:.2f}", "Confusion: share of the true class")
    *during, final = summary["gradient_flow"]
    lines = [(during[0], "before training", TRAIN)]
    if len(during) > 1:
        lines.append((during[1], f"epoch {during[1]['epoch']}", VALIDATION))
    lines.append((final, f"epoch {final['epoch']}, kept", FINAL))
    _flow(panels["flow"], lines)
    return figure


def draw_comparison(runs: Sequence[tuple[str, dict[str, Any]]], replacements: Mapping[int, str]) -> Figure:
    """Draws the accuracy and the gradient flow of several runs.

    Args:
        runs: Title and summary of each.
        replacements: See draw_run.
    """
    figure = Figure(figsize=(12, 10), dpi=120, layout="constrained")
    accuracy, flow = figure.subplots(2, 1)
    lines = []
    for (title, summary), color in zip(runs, RUNS, strict=False):
        name = f"{title}: {CELLS[summary['architecture']].upper()}".translate(replacements)
        part = "validation" if summary["validation_sequences"] else "train"
        points = [(row["epoch"], row[f"{part}_accuracy"]) for row in summary["history"]]
        label = f"{name}; {summary['judged_on']} {summary['accuracy']:.4f}"
        accuracy.plot(*zip(*points, strict=True), color=color, label=label, marker="." if len(points) < 3 else "")
        lines.append((summary["gradient_flow"][-1], name, color))
    accuracy.set(title="Accuracy on the validation sequences", xlabel="epoch", ylabel="accuracy", ylim=(-0.02, 1.02))
    accuracy.grid(alpha=0.3)
    accuracy.legend()
    _flow(flow, lines)
    return figure


def _texts(summary: dict[str, Any]) -> list[str]:
    return [str(summary["data"]), *map(str, summary["class_labels"])]


def _curves(axes: Axes, summary: dict[str, Any], kind: str) -> None:
    history = summary["history"]
    for part, color in (("train", TRAIN), ("validation", VALIDATION)):
        points = [(row["epoch"], row[f"{part}_{kind}"]) for row in history if f"{part}_{kind}" in row]
        if points:
            axes.plot(*zip(*points, strict=True), color=color, label=part, marker="." if len(points) < 3 else "")
    best = summary["best_epoch"]
    axes.axvline(best, color=FINAL, linestyle=":", label=f"kept: epoch {best}")
    if "test" in summary["splits"]:
        figure = summary["splits"]["test"][kind]
        axes.plot([best], [figure], "D", color=FINAL, markersize=5, label=f"test: {figure:.4f}")
    if kind == "accuracy":
        axes.axhline(summary["majority_accuracy"], color=FINAL, linestyle="--", lw=0.8, label="most frequent class")
    axes.set(title=kind.capitalize(), xlabel="epoch", ylabel=kind if kind == "accuracy" else "cross-entropy, nats")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend()


def _confusion(axes: Axes, matrix: NDArray[Any], labels: list[str], form: str, title: str) -> None:
    """Draws a confusion matrix [classes, classes], on a scale that shows one mistake among hundreds of hits."""
    top = max(matrix.max(), np.finfo(float).tiny)
    shades = (matrix / top) ** 0.5
    axes.imshow(np.ma.masked_equal(shades, 0), cmap="Blues", vmin=-0.15, vmax=1)
    if len(labels) <= NUMBERED:
        for (row, column), value in np.ndenumerate(matrix):
            if value:
                color = "white" if shades[row, column] > 0.7 else FINAL
                size = 10 if len(labels) <= 10 else 6
                axes.text(column, row, form.format(value), ha="center", va="center", color=color, fontsize=size)
    if len(labels) <= NAMED:
        names = [label if len(label) <= 16 else f"{label[:15]}…" for label in labels]
        crowded = sum(map(len, names)) > 40
        axes.set_xticks(range(len(names)), names, rotation=90 if crowded else 0)
        axes.set_yticks(range(len(names)), names)
    axes.set(title=title, xlabel="predicted class", ylabel="true class")


def _flow(axes: Axes, lines: Sequence[tuple[dict[str, Any], str, str]]) -> None:
    """Draws gradient flows, each with its name and colour; marks where each falls below `VANISHED`."""
    for flow, name, color in lines:
        # The mean over a few sequences is not informative.
        counts = np.array(flow["sequences"])
        shown = np.array([np.nan if norm is None else norm for norm in flow["log10_norms"]])
        shown = shown[counts >= min(FEW, counts.max())]
        label = name
        if flow["spectral_radius"]:
            label += "; spectral radius " + ", ".join(f"{value:.2f}" for value in flow["spectral_radius"])
        marker = "." if len(shown) < 60 else ""
        below = np.flatnonzero(~(shown > shown[0] + np.log10(VANISHED)))
        if len(below):
            label += f"; vanished after {below[0]} steps"
        axes.plot(np.arange(len(shown)), shown, color=color, marker=marker, label=label)
        if len(below):
            axes.axvline(below[0], color=color, linestyle=":")
            if not np.isfinite(shown[below[0]]):
                axes.plot([below[0]], [shown[below[0] - 1] if below[0] else 0], "x", color=color, markersize=8)
    axes.set(
        title=f"Gradient flow; a dotted line marks less than {VANISHED:g} of it",
        xlabel="distance from the end of the sequence, steps",
        ylabel="log10 of the mean norm of dL/ds",
    )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend()
