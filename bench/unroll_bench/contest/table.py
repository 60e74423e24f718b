"""The report: lines for a terminal, Markdown, JSON."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from unroll_bench.contest.figures import Outcome, Verdict

HEADER = ("what", "compared", "measured (quartiles)", "bar", "")


def word(verdict: Verdict) -> str:
    """Returns "met" or "not met", or why the claim was not measured."""
    if not verdict.samples:
        return "not measured"
    return "met" if verdict.met else "not met"


def lines(outcome: Outcome) -> Iterator[str]:
    """Yields an outcome for a terminal: a line for each verdict and each note."""
    for verdict in outcome.verdicts:
        result = word(verdict)
        color = "green" if verdict.met else "red"
        yield f"{verdict.claim}: {verdict.measured}; {verdict.asked}: {click.style(result, fg=color)}"
    for note in outcome.notes:
        yield click.style(note, dim=True)
    if outcome.problem:
        yield click.style(outcome.problem, fg="red")


def markdown(machine: Mapping[str, str], outcomes: Sequence[Outcome]) -> str:
    """Returns machine, verdicts, figures and notes as Markdown."""
    lines = ["## Machine", "", *_markdown_table(("", ""), [tuple(item) for item in machine.items()]), "", "## Bars", ""]
    rows = []
    for outcome in outcomes:
        if outcome.problem:
            rows.append((outcome.what, outcome.problem, "", "", "failed"))
        for verdict in outcome.verdicts:
            note = f" ({verdict.missing})" if verdict.missing else ""
            rows.append((outcome.what, verdict.claim + note, verdict.measured, verdict.asked, word(verdict)))
    lines += [*_markdown_table(HEADER, rows), "", "## Figures"]
    for outcome in outcomes:
        lines += ["", f"### {outcome.key}: {outcome.what}", ""]
        figures = [
            (
                figure.contestant,
                figure.metric,
                *map(number, (figure.spread.median, figure.spread.low, figure.spread.high)),
            )
            for figure in outcome.figures
        ]
        lines += _markdown_table(("contestant", "metric", "median", "lower quartile", "upper quartile"), figures)
        lines += ["", *(f"- {note}" for note in outcome.notes)]
    return "\n".join(lines) + "\n"


def to_json(machine: Mapping[str, str], settings: Mapping[str, Any], outcomes: Sequence[Outcome]) -> str:
    """Returns everything as JSON, with the samples of every round."""
    report = {"machine": machine, "settings": settings, "rows": [outcome.to_json() for outcome in outcomes]}
    return json.dumps(report, indent=1) + "\n"


def write(folder: Path, machine: Mapping[str, str], settings: Mapping[str, Any], outcomes: Sequence[Outcome]) -> None:
    """Writes table.md and report.json into `folder`."""
    (folder / "table.md").write_text(markdown(machine, outcomes), encoding="utf-8")
    (folder / "report.json").write_text(to_json(machine, settings, outcomes), encoding="utf-8")


def _markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    cells = [header, ["---"] * len(header), *rows]
    return [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in cells]


def number(value: float) -> str:
    """Formats a figure with three digits, or as a whole number."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
