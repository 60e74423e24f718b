"""`unroll-train report`: a PNG of the summary, for any number of classes and layers."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

from unroll_export import experiment, sources, train_cli
from unroll_export.fonts import fonts_for
from unroll_export.report import draw_comparison, draw_run, write_report
from unroll_export.runs import SUMMARY, RunError
from unroll_export.training import Hyperparameters


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a few epochs."""
    out = tmp_path_factory.mktemp("runs") / "recall"
    experiment.run(sources.recall(lag=4, seed=0), Hyperparameters(hidden_size=8, epochs=6, batch_size=32), out)
    return out


@pytest.fixture
def summary(run: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((run / SUMMARY).read_text())
    return loaded


def test_the_command_writes_a_picture(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "report.png"
    monkeypatch.setattr(sys, "argv", ["unroll-train", "report", str(run), "-o", str(output)])
    with pytest.raises(SystemExit) as ended:
        train_cli.main()
    assert ended.value.code == 0
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == (f"{output}\n", "")
    pixels = imread(output)
    assert pixels.shape[:2] == (1560, 1440)
    # Every panel is drawn on.
    for panel in (pixels[top : top + 520, left : left + 720] for top in (0, 520, 1040) for left in (0, 720)):
        assert len(np.unique(panel.reshape(-1, pixels.shape[2]), axis=0)) > 50
    assert list(tmp_path.iterdir()) == [output]


def test_the_picture_shows_the_figures_of_the_summary(summary: dict[str, Any]) -> None:
    loss, accuracy, confusion, shares, flow = draw_run("a title", summary, {}).axes
    history = summary["history"]
    for axes, kind in ((loss, "loss"), (accuracy, "accuracy")):
        lines = {line.get_label(): np.asarray(line.get_ydata()).tolist() for line in axes.get_lines()}
        assert lines["train"] == [row[f"train_{kind}"] for row in history]
        assert lines["validation"] == [row[f"validation_{kind}"] for row in history]
        assert lines[f"test: {summary['splits']['test'][kind]:.4f}"] == [summary["splits"]["test"][kind]]
    cells = {text.get_position(): text.get_text() for text in confusion.texts}
    matrix = np.array(summary["confusion_matrix"])
    assert cells == {(column, row): str(count) for (row, column), count in np.ndenumerate(matrix) if count}
    rows = [sum(float(text.get_text()) for text in shares.texts if text.get_position()[1] == row) for row in range(8)]
    assert rows == pytest.approx([1] * 8, abs=0.05)
    drawn = [np.asarray(line.get_ydata()).tolist() for line in flow.get_lines()]
    flows = summary["gradient_flow"]
    assert drawn == [flows[0]["log10_norms"], flows[1]["log10_norms"], flows[-1]["log10_norms"]]


@pytest.mark.parametrize("classes", [2, 12, 40])
def test_any_number_of_classes_fits(summary: dict[str, Any], tmp_path: Path, classes: int) -> None:
    summary["class_labels"] = [f"a rather long name of class {i}" for i in range(classes)]
    summary["confusion_matrix"] = (np.eye(classes, dtype=int) * 1000).tolist()
    draw_run("many", summary, {}).savefig(tmp_path / "many.png")
    assert (tmp_path / "many.png").stat().st_size > 10_000


def test_gradients_that_vanish_altogether_and_parts_that_are_missing_are_drawn(
    summary: dict[str, Any], tmp_path: Path
) -> None:
    for flow in summary["gradient_flow"]:
        flow["log10_norms"][2:] = [None] * (len(flow["log10_norms"]) - 2)
    for row in summary["history"]:
        del row["validation_loss"], row["validation_accuracy"]
    summary["judged_on"], summary["splits"] = "train", {"train": summary["splits"]["train"]}
    figure = draw_run("bare", summary, {})
    figure.savefig(tmp_path / "bare.png")
    marks = [text.get_text() for text in figure.axes[-1].get_legend().get_texts()]  # type: ignore[union-attr]
    assert all(mark.endswith("; vanished after 2 steps") for mark in marks)


def test_runs_are_compared(run: Path, summary: dict[str, Any], tmp_path: Path) -> None:
    write_report([run, run], tmp_path / "both.png")
    assert imread(tmp_path / "both.png").shape[:2] == (1200, 1440)
    accuracy, flow = draw_comparison([("one", summary), ("two", summary | {"architecture": "simple_gru"})], {}).axes
    names = [str(line.get_label()).partition(";")[0] for line in (*accuracy.get_lines(), *flow.get_lines())]
    assert names == ["one: RNN", "two: GRU"] * 2


def test_labels_of_any_script_are_drawn(run: Path, summary: dict[str, Any], tmp_path: Path) -> None:
    summary["class_labels"] = ["走る", "걷기", "🏃", "ход", "جري", "run", "\u0378", r"$\foo$"]
    (tmp_path / SUMMARY).write_text(json.dumps(summary))
    write_report([tmp_path], tmp_path / "report.png")
    with fonts_for(["run \u0378"]) as replacements:
        assert "run \u0378".translate(replacements) == "run <U+0378>"


def test_what_is_no_run_is_refused(summary: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no training run here"):
        write_report([tmp_path], tmp_path / "report.png")
    del summary["gradient_flow"]
    (tmp_path / SUMMARY).write_text(json.dumps(summary))
    with pytest.raises(RunError, match=r"missing or of the wrong type: 'gradient_flow'"):
        write_report([tmp_path], tmp_path / "report.png")
    assert not (tmp_path / "report.png").exists()
