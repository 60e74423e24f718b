"""`unroll-train report`: a PNG that shows what the summary says, for any number of classes and layers."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

from unroll_export import experiment, sources, train_cli
from unroll_export.report import draw, write_report
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
    assert pixels.shape[:2] == (1080, 1440)
    # Every quarter has something drawn on it.
    for quarter in (pixels[:540, :720], pixels[:540, 720:], pixels[540:, :720], pixels[540:, 720:]):
        assert len(np.unique(quarter.reshape(-1, pixels.shape[2]), axis=0)) > 50
    assert list(tmp_path.iterdir()) == [output]


def test_the_picture_shows_the_figures_of_the_summary(summary: dict[str, Any]) -> None:
    loss, accuracy, confusion, flow = draw(summary, "a title").axes
    history = summary["history"]
    for axes, kind in ((loss, "loss"), (accuracy, "accuracy")):
        lines = {line.get_label(): np.asarray(line.get_ydata()).tolist() for line in axes.get_lines()}
        assert lines["train"] == [row[f"train_{kind}"] for row in history]
        assert lines["validation"] == [row[f"validation_{kind}"] for row in history]
        assert lines[f"test: {summary['splits']['test'][kind]:.4f}"] == [summary["splits"]["test"][kind]]
    cells = {text.get_position(): text.get_text() for text in confusion.texts}
    matrix = np.array(summary["confusion_matrix"])
    assert cells == {(column, row): str(count) for (row, column), count in np.ndenumerate(matrix) if count}
    drawn = [np.asarray(line.get_ydata()).tolist() for line in flow.get_lines()]
    flows = summary["gradient_flow"]
    assert drawn == [flows[0]["norms"], flows[1]["norms"], flows[-1]["norms"]]
    assert flow.get_yscale() == "log"


@pytest.mark.parametrize("classes", [2, 12, 40])
def test_any_number_of_classes_fits(summary: dict[str, Any], tmp_path: Path, classes: int) -> None:
    summary["class_labels"] = [f"a rather long name of class {i}" for i in range(classes)]
    summary["confusion_matrix"] = (np.eye(classes, dtype=int) * 1000).tolist()
    draw(summary, "many").savefig(tmp_path / "many.png")
    assert (tmp_path / "many.png").stat().st_size > 10_000


def test_gradients_that_vanish_altogether_and_parts_that_are_missing_are_drawn(
    summary: dict[str, Any], tmp_path: Path
) -> None:
    for flow in summary["gradient_flow"]:
        flow["norms"][1:] = [0.0] * (len(flow["norms"]) - 1)
    for row in summary["history"]:
        del row["validation_loss"], row["validation_accuracy"]
    summary["judged_on"], summary["splits"] = "train", {"train": summary["splits"]["train"]}
    draw(summary, "bare").savefig(tmp_path / "bare.png")


def test_what_is_no_run_is_refused(summary: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no training run here"):
        write_report(tmp_path, tmp_path / "report.png")
    del summary["gradient_flow"]
    (tmp_path / SUMMARY).write_text(json.dumps(summary))
    with pytest.raises(RunError, match=r"missing or of the wrong type: 'gradient_flow'"):
        write_report(tmp_path, tmp_path / "report.png")
    assert not (tmp_path / "report.png").exists()
