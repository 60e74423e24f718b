"""`unroll-train` on the command line: the files of a run, and one-line errors for bad input."""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from unroll_export import train_cli
from unroll_export.runs import load_run

QUICK = ("--hidden-size", "8", "--epochs", "11", "--batch-size", "8")


class Outcome:
    """Output and exit code of a call."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Calls `unroll-train` with arguments."""

    def run(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["unroll-train", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            train_cli.main()
        printed = capsys.readouterr()
        return Outcome(int(ended.value.code or 0), printed.out, printed.err)

    return run


def write(path: Path, labels: list[Any], **columns: list[Any]) -> Path:
    """Writes sequences of 2 features as JSON Lines; the label is the sign of their values."""
    random = np.random.default_rng(0)
    lines = []
    for i, label in enumerate(labels):
        shift = 2 * labels.index(label) - 1
        row = {"sequence": (random.standard_normal((1 + i % 4, 2)) + shift).tolist(), "label": label}
        lines.append(json.dumps(row | {name: column[i] for name, column in columns.items()}))
    path.write_text("\n".join(lines))
    return path


def test_own_data_is_trained_on_and_summed_up(call: Any, tmp_path: Path) -> None:
    data, out = write(tmp_path / "own.jsonl", [10, 9, 100] * 10), tmp_path / "deep" / "run"
    done = call("--data", data, "--out", out, "--layers", 2, "--seed", 5, *QUICK)
    progress, *warnings = done.err.splitlines()
    assert done.code == 0
    assert progress.startswith("epoch 10 of 11: loss ")
    assert done.out.startswith(f"{out}: test accuracy ")
    run = load_run(out)
    summary = run.summary
    assert warnings == [f"warning: {text}" for text in summary["warnings"]]
    assert run.class_labels == ("9", "10", "100")
    assert (run.model.rnn.num_layers, run.model.rnn.hidden_size, run.model.fc.out_features) == (2, 8, 3)
    assert summary["data"] == "own.jsonl"
    assert summary["data_sha256"] == hashlib.sha256(data.read_bytes()).hexdigest()
    assert summary["hyperparameters"]["seed"] == summary["seed"] == 5
    assert summary["hyperparameters"]["num_layers"] == 2
    counts = [summary[f"{part}_sequences"] for part in ("training", "validation", "test")]
    assert counts == [21, 3, 6]
    assert summary["longest_sequence"] == 4
    assert summary["epochs"] == len(summary["history"]) == 11
    assert summary["history"][-1].keys() >= {"train_loss", "train_accuracy", "validation_loss", "validation_accuracy"}
    assert summary["judged_on"] == "test"
    confusion = np.array(summary["confusion_matrix"])
    assert confusion.sum(1).tolist() == [2, 2, 2]
    assert summary["accuracy"] == summary["test_accuracy"] == confusion.trace() / 6
    for i, row in enumerate(summary["per_class"]):
        assert row["label"] == run.class_labels[i]
        assert row["support"] == 2
        assert row["recall"] == confusion[i, i] / 2
        assert row["precision"] == (confusion[i, i] / confusion[:, i].sum() if confusion[:, i].any() else 0)
    assert [flow["epoch"] for flow in summary["gradient_flow"]] == [0, 1, 2, 5, 10, summary["best_epoch"]]
    assert len(summary["gradient_flow"][0]["spectral_radius"]) == 2
    assert summary["libraries"]["torch"] == torch.__version__


def test_two_classes_make_a_binary_model_that_knows_both_labels(call: Any, tmp_path: Path) -> None:
    data = write(tmp_path / "own.jsonl", ["no", "yes"] * 20)
    assert call("--data", data, "--out", tmp_path / "run", *QUICK, "--lr", 0.02).code == 0
    run = load_run(tmp_path / "run")
    assert run.class_labels == ("no", "yes")
    assert run.model.fc.out_features == run.summary["output_size"] == 1
    assert run.summary["accuracy"] == 1.0
    with torch.no_grad():
        logits = run.model(torch.tensor([[[-2.0, -2.0]], [[3.0, 3.0]]]))
    assert logits[0, 0] < 0 < logits[1, 0]  # class 1, "yes", is the positive one


def test_without_a_test_split_validation_is_judged(call: Any, tmp_path: Path) -> None:
    data = write(tmp_path / "own.jsonl", ["a", "b"] * 20)
    done = call("--data", data, "--out", tmp_path / "run", "--test-fraction", 0, *QUICK)
    assert "validation accuracy" in done.out
    summary = load_run(tmp_path / "run").summary
    assert (summary["judged_on"], summary["test_accuracy"], summary["test_sequences"]) == ("validation", None, 0)
    done = call("--data", data, "--out", tmp_path / "all", "--test-fraction", 0, "--validation-fraction", 0, *QUICK)
    assert "train accuracy" in done.out
    assert load_run(tmp_path / "all").summary["training_sequences"] == 40


def test_japanese_vowels_and_recall_go_by_their_names(call: Any, tmp_path: Path) -> None:
    quick = ("--hidden-size", 8, "--epochs", 1)
    assert call("--data", "japanese-vowels", "--out", tmp_path / "jv", *quick).code == 0
    summary = load_run(tmp_path / "jv").summary
    assert [summary[f"{part}_sequences"] for part in ("training", "validation", "test")] == [243, 27, 370]
    assert call("--data", "recall", "--lag", 9, "--out", tmp_path / "recall", *quick).code == 0
    summary = load_run(tmp_path / "recall").summary
    assert (summary["data"], summary["data_parameters"], summary["longest_sequence"]) == ("recall", {"lag": 9}, 10)


def test_resuming_and_overwriting(call: Any, tmp_path: Path) -> None:
    data, out = write(tmp_path / "own.jsonl", ["a", "b"] * 10), tmp_path / "run"
    assert call("--data", data, "--out", out, *QUICK).code == 0
    first = (out / "weights.safetensors").read_bytes()
    again = call("--data", data, "--out", out, *QUICK)
    assert (again.code, again.err) == (2, f"unroll-train: {out}: holds a finished run; --overwrite replaces it\n")
    assert call("--data", data, "--out", out, "--resume", *QUICK).code == 0
    changed = call("--data", data, "--out", out, "--resume", *QUICK, "--lr", 0.5)
    assert changed.code == 2
    assert "began with learning_rate 0.002, not 0.5" in changed.err
    assert (out / "weights.safetensors").read_bytes() == first
    assert call("--data", data, "--out", out, "--overwrite", *QUICK, "--lr", 0.5).code == 0
    assert (out / "weights.safetensors").read_bytes() != first


ROW = {"sequence": [[1.0, 2.0]], "label": "a"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"sequenze": [[1.0, 2.0]], "label": "a"}, "row 3: column 'sequence'"),
        ({"sequence": [[1.0, 2.0]], "labl": "a"}, "row 3: column 'label'"),
        ({"sequence": [[1.0, 2.0], [3.0]], "label": "a"}, "row 3: column 'sequence'"),
        ({"sequence": [[1.0, 2.0, 3.0]], "label": "a"}, "row 3: column 'sequence'"),
        ({"sequence": [[1.0, float("nan")]], "label": "a"}, "row 3: column 'sequence'"),
        ({"sequence": [], "label": "a"}, "row 3: column 'sequence'"),
        ({"sequence": [[1.0, 2.0]], "label": 1.5}, "row 3: column 'label'"),
        ({"sequence": [[1.0, 2.0]], "label": "a", "split": "dev"}, "row 3: column 'split'"),
    ],
)
def test_a_bad_row_gives_one_line_and_no_folder(call: Any, tmp_path: Path, row: dict[str, Any], message: str) -> None:
    data = tmp_path / "own.jsonl"
    data.write_text("".join(json.dumps(r) + "\n" for r in (ROW, ROW | {"label": "b"}, row, ROW)))
    done = call("--data", data, "--out", tmp_path / "run")
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
    assert done.err.startswith(f"unroll-train: {data}: {message}")
    assert list(tmp_path.iterdir()) == [data]


def test_a_single_class_gives_one_line_and_no_folder(call: Any, tmp_path: Path) -> None:
    data = write(tmp_path / "own.jsonl", ["a"] * 9)
    done = call("--data", data, "--out", tmp_path / "run")
    what = "row 1: column 'label': 'a' is the only class of the training sequences; 2 or more are needed"
    assert (done.code, done.err) == (2, f"unroll-train: {data}: {what}\n")
    assert list(tmp_path.iterdir()) == [data]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--data is missing: japanese-vowels, recall or a file"),
        (("--out", "OUT"), "Missing option '--data'"),
        (("--data", "recall"), "Missing option '--out'"),
        (("--data", "reccall", "--out", "OUT"), "--data: 'reccall' is not a file; expected japanese-vowels, recall or"),
        (("--data", "absent.parquet", "--out", "OUT"), "absent.parquet: no such file or directory"),
        (("--data", "absent.csv", "--out", "OUT"), "absent.csv: "),
        (("--data", "japanese-vowels", "--lag", "3", "--out", "OUT"), "--lag goes with --data recall"),
        (("--data", "recall", "--test-data", "x.ts", "--out", "OUT"), "--test-data goes with a file"),
        (("--data", "recall", "--out", "OUT", "--resume", "--overwrite"), "--resume and --overwrite exclude"),
        (("--data", "recall", "--out", "OUT", "--hidden-size", "0"), "Invalid value for '--hidden-size'"),
        (("--data", "recall", "--out", "OUT", "--lr", "nan"), "Invalid value for '--lr'"),
        (("--data", "recall", "--out", "OUT", "--lr", "inf"), "Invalid value for '--lr'"),
        (("--data", "recall", "--out", "OUT", "--clip", "0"), "Invalid value for '--clip'"),
        (("--data", "recall", "--out", "OUT", "--input-noise", "much"), "Invalid value for '--input-noise'"),
        (("--data", "recall", "--out", "OUT", "--validation-fraction", "1"), "Invalid value for '--validation-frac"),
        (("--data", "recall", "--out", "OUT", "--depth", "2"), "No such option"),
        (("--data", "recall", "--out", "OUT", "--dropout", "0.5"), "--dropout is between layers"),
        (("--data", "recall", "--out", "OUT", "--cell", "gru", "--nonlinearity", "relu"), "--nonlinearity goes with"),
        (("report", "A", "B"), "--output is required"),
        (("report", *"ABCDEFG", "-o", "x.png"), "RUN: 7 given, 6 at most"),
        (("--data", "recall", "--out", "/dev/null/run"), "/dev/null/run: not a directory"),
        (("report", "OUT"), "OUT: no training run here"),
    ],
)
def test_bad_usage_gives_one_line(
    call: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    done = call(*arguments)
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
    assert done.err.startswith(f"unroll-train: {message}")
    assert list(tmp_path.iterdir()) == []


def test_aeon_missing_gives_one_line(call: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "aeon", None)
    done = call("--data", "japanese-vowels", "--out", tmp_path / "run")
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert "pip install --no-deps aeon==1.6.0" in done.err
    assert list(tmp_path.iterdir()) == []


def test_help_shows_every_option_and_the_report(call: Any) -> None:
    done = call("--help")
    assert done.code == 0
    for word in ("--data", "--out", "--resume", "--overwrite", "--lag", "--hidden-size", "--layers", "report"):
        assert word in done.out
    assert "\n    unroll-train report runs/jv\n" in done.out
    assert "[default: 128; x>=1]" in done.out
