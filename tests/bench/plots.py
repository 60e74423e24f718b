"""The report's pictures: rates side by side, and latency over offered load."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib

from bench.figures import Figure, Outcome
from bench.table import number

matplotlib.use("Agg")

from matplotlib import pyplot
from matplotlib.axes import Axes

OURS, OTHERS = "#2b6cb0", "#a0aec0"


def draw(folder: Path, outcomes: Sequence[Outcome]) -> list[Path]:
    """Writes a PNG a row that has figures, and one a row that has curves; returns them."""
    paths = []
    for outcome in outcomes:
        metrics = list(dict.fromkeys(figure.metric for figure in outcome.figures))
        if metrics:
            paths.append(_bars(folder / f"{outcome.key}.png", outcome, metrics))
        if outcome.curves:
            paths.append(_curves(folder / f"{outcome.key}-load.png", outcome))
    return paths


def _bars(path: Path, outcome: Outcome, metrics: Sequence[str]) -> Path:
    """A panel a metric: a bar a contestant, with the quartiles."""
    groups = [[figure for figure in outcome.figures if figure.metric == metric] for metric in metrics]
    heights = [0.7 + 0.32 * len(group) for group in groups]
    drawing, panels = pyplot.subplots(
        len(groups), 1, figsize=(8, sum(heights) + 0.5), height_ratios=heights, squeeze=False, layout="constrained"
    )
    drawing.suptitle(outcome.what, fontsize=10)
    for axes, metric, group in zip(panels[:, 0], metrics, groups, strict=True):
        _panel(axes, metric, group)
    drawing.savefig(path, dpi=120)
    pyplot.close(drawing)
    return path


def _panel(axes: Axes, metric: str, figures: Sequence[Figure]) -> None:
    spreads = [figure.spread for figure in figures]
    names = [f"{figure.contestant} " for figure in figures]
    medians = [spread.median for spread in spreads]
    errors = [[s.median - s.low for s in spreads], [s.high - s.median for s in spreads]]
    colors = [OURS if _is_ours(figure.contestant) else OTHERS for figure in figures]
    bars = axes.barh(range(len(names)), medians, xerr=errors, color=colors, capsize=3)
    axes.bar_label(bars, labels=[f" {number(median)}" for median in medians], fontsize=7)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_title(metric, fontsize=8, loc="left")
    axes.tick_params(axis="x", labelsize=7)


def _curves(path: Path, outcome: Outcome) -> Path:
    drawing, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for curve in outcome.curves:
        (line,) = axes.plot(
            curve.rates, [seconds * 1e3 for seconds in curve.p99], "o-", label=f"{curve.contestant}, p99"
        )
        axes.plot(
            curve.rates,
            [seconds * 1e3 for seconds in curve.p50],
            "s--",
            color=line.get_color(),
            alpha=0.5,
            label=f"{curve.contestant}, p50",
        )
    axes.set_yscale("log")
    axes.set_xlabel("offered requests/s (Poisson arrivals)")
    axes.set_ylabel("ms from the intended beginning")
    axes.set_title(outcome.what, fontsize=10)
    axes.grid(visible=True, which="both", alpha=0.3)
    axes.legend(fontsize=8)
    drawing.savefig(path, dpi=120)
    pyplot.close(drawing)
    return path


def _is_ours(contestant: str) -> bool:
    return any(word in contestant for word in ("Unroll", "our ", "Scan", "together"))
