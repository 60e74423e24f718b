"""Run folders: load_run returns the trained model, and refuses damaged folders in one line."""

import json
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from unroll_export import SimpleRNN
from unroll_export.runs import SUMMARY, WEIGHTS, RunError, load_run, replaced, save_weights

SIZES = {"input_size": 2, "hidden_size": 4, "output_size": 3, "num_layers": 2}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with random weights."""
    torch.manual_seed(0)
    model = SimpleRNN(2, 4, 3, 2)
    model.mean.fill_(0.5)
    model.std.fill_(2.0)
    save_weights(model, tmp_path / WEIGHTS)
    summary = {
        "format": 1,
        "architecture": "simple_rnn",
        "class_labels": ["a", "b", "c"],
        "feature_names": ["x", "y"],
        **SIZES,
    }
    (tmp_path / SUMMARY).write_text(json.dumps(summary))
    return tmp_path


def test_a_run_is_read_back(run: Path) -> None:
    loaded = load_run(run)
    torch.manual_seed(0)
    model = SimpleRNN(2, 4, 3, 2)
    assert not loaded.model.training
    assert (loaded.class_labels, loaded.feature_names) == (("a", "b", "c"), ("x", "y"))
    assert loaded.summary["hidden_size"] == 4
    assert torch.equal(loaded.model.mean, torch.full((2,), 0.5))
    for name, parameter in model.named_parameters():
        assert torch.equal(loaded.model.get_parameter(name), parameter)


def test_weights_have_pytorchs_names_and_can_be_read_by_others(run: Path) -> None:
    names = [f"{kind}_{of}_l{layer}" for layer in (0, 1) for kind in ("weight", "bias") for of in ("ih", "hh")]
    expected = {f"rnn.{name}" for name in names} | {"fc.weight", "fc.bias", "mean", "std"}
    assert set(load_file(run / WEIGHTS)) == expected
    assert (run / WEIGHTS).stat().st_mode & stat.S_IRWXO == (run / SUMMARY).stat().st_mode & stat.S_IRWXO


def of_summary(**changes: Any) -> Callable[[Path], None]:
    def change(run: Path) -> None:
        summary = json.loads((run / SUMMARY).read_text()) | changes
        (run / SUMMARY).write_text(json.dumps({k: v for k, v in summary.items() if v is not None}))

    return change


def of_weights(name: str, tensor: torch.Tensor | None) -> Callable[[Path], None]:
    def change(run: Path) -> None:
        weights = {k: v for k, v in (load_file(run / WEIGHTS) | {name: tensor}).items() if v is not None}
        save_file(weights, run / WEIGHTS)

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda run: (run / SUMMARY).unlink(), "no training run here"),
        (lambda run: (run / SUMMARY).write_text("{"), "summary.json: not readable as JSON"),
        (lambda run: (run / SUMMARY).write_text("[]"), "not a summary of format 1"),
        (of_summary(format=2), "not a summary of format 1"),
        (of_summary(hidden_size=None), "missing or of the wrong type: 'hidden_size'"),
        (of_summary(num_layers="deep"), "missing or of the wrong type"),
        (of_summary(hidden_size=0), "hidden_size is 0"),
        (of_summary(class_labels=["a", "b"]), "2 class labels for 3 logits"),
        (of_summary(feature_names=["x"]), "1 feature names for 2 features"),
        (of_summary(hidden_size=5), r"is torch.float32 \(.*\), expected float32"),
        (lambda run: (run / WEIGHTS).unlink(), "weights.safetensors: not readable"),
        (lambda run: (run / WEIGHTS).write_bytes(b"nonsense"), "weights.safetensors: not readable"),
        (of_weights("fc.bias", None), "expected .*fc.bias"),
        (of_weights("extra", torch.zeros(1)), "holds .*extra"),
        (of_weights("fc.bias", torch.zeros(3, dtype=torch.float64)), "fc.bias is torch.float64"),
        (of_weights("fc.bias", torch.tensor([0.0, torch.nan, 0.0])), "fc.bias holds values that are not finite"),
        (of_weights("std", torch.tensor([1.0, 0.0])), "std holds values that are not positive"),
    ],
)
def test_a_damaged_run_is_refused(run: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(run)
    with pytest.raises(RunError, match=message) as caught:
        load_run(run)
    assert str(caught.value).startswith(str(run))
    assert "\n" not in str(caught.value)


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def write_and_fail() -> None:
        with replaced(path) as partial:
            partial.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write_and_fail()
    assert path.read_text() == "old"
    with replaced(path) as partial:
        partial.write_text("new")
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]
