"""A training run as one picture: loss and accuracy, confusion matrix, and how far gradients flow back."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from unroll_export.runs import SUMMARY, RunError, load_summary, replaced

TRAIN, VALIDATION, FINAL = "#1f6fb4", "#e07a1f", "#222222"
# More cells than this are drawn without their numbers, more classes than this without their names.
NUMBERED, NAMED = 20, 30
FEW = 8


def write_report(run: Path, output: Path) -> None:
    """Draws the run in the folder `run` as the PNG `output`, from its summary alone.

    Raises:
        RunError: the folder holds no finished run, or its summary lacks something.
    """
    summary = load_summary(run)
    try:
        figure = draw(summary, title=run.resolve().name)
    except (KeyError, IndexError, TypeError) as error:
        raise RunError(f"{run / SUMMARY}: missing or of the wrong type: {error}") from error
    output.parent.mkdir(parents=True, exist_ok=True)
    with replaced(output) as partial:
        figure.savefig(partial, format="png")


def draw(summary: dict[str, Any], title: str) -> Figure:
    """Draws the report of a summary."""
    figure = Figure(figsize=(12, 9), dpi=120, layout="constrained")
    ((loss, accuracy), (confusion, flow)) = figure.subplots(2, 2)
    figure.suptitle(
        f"{title}: {summary['data']}, {summary['judged_on']} accuracy {summary['accuracy']:.4f}, "
        f"hidden size {summary['hidden_size']} x {summary['num_layers']}, seed {summary['seed']}",
        fontsize=13,
    )
    _curves(loss, summary, "loss")
    loss.set_yscale("log")
    _curves(accuracy, summary, "accuracy")
    accuracy.set_ylim(-0.02, 1.02)
    _confusion(confusion, summary)
    _flow(flow, summary["gradient_flow"])
    return figure


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
    axes.set(title=kind.capitalize(), xlabel="epoch", ylabel=kind if kind == "accuracy" else "cross-entropy, nats")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend()


def _confusion(axes: Axes, summary: dict[str, Any]) -> None:
    matrix = np.array(summary["confusion_matrix"])
    labels = summary["class_labels"]
    # On a log scale one mistake among hundreds of hits still shows.
    top = max(2, int(matrix.max()))
    axes.imshow(np.ma.masked_equal(matrix, 0), cmap="Blues", norm=LogNorm(1, top))
    if len(labels) <= NUMBERED:
        for (row, column), count in np.ndenumerate(matrix):
            if count:
                color = "white" if count > top**0.6 else FINAL
                axes.text(column, row, str(count), ha="center", va="center", color=color)
    if len(labels) <= NAMED:
        names = [label if len(label) <= 16 else f"{label[:15]}…" for label in labels]
        crowded = sum(map(len, names)) > 40
        axes.set_xticks(range(len(names)), names, rotation=90 if crowded else 0)
        axes.set_yticks(range(len(names)), names)
    axes.set(title=f"Confusion, {summary['judged_on']} split", xlabel="predicted class", ylabel="true class")


def _flow(axes: Axes, flows: list[dict[str, Any]]) -> None:
    *during, final = flows
    first, *others = during
    shown = [(first, "before training", TRAIN)]
    if others:
        shown.append((others[0], f"epoch {others[0]['epoch']}", VALIDATION))
    shown.append((final, f"epoch {final['epoch']}, kept", FINAL))
    for flow, name, color in shown:
        # The mean over a few sequences says little.
        counts = np.array(flow["sequences"])
        norms = np.array(flow["norms"])[counts >= min(FEW, counts.max())]
        radius = ", ".join(f"{value:.2f}" for value in flow["spectral_radius"])
        axes.plot(
            np.arange(len(norms)),
            np.where(norms > 0, norms, np.nan),
            color=color,
            marker="." if len(norms) < 60 else "",
            label=f"{name}; spectral radius {radius}",
        )
    axes.set_yscale("log")
    axes.set(title="Gradient flow", xlabel="distance from the end of the sequence, steps", ylabel="mean norm of dL/dh")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend()
