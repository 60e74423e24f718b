"""`make gpu` on a machine without a card: it skips with the reason, or runs on the CPU on request."""

from importlib.util import find_spec

import pytest
import torch

from unroll_bench import gpu
from unroll_export.parity.runners import ParityError


def test_without_a_card_it_says_so_and_ends_well(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 0
    assert capsys.readouterr().out == f"gpu: skipped: torch {torch.__version__} finds no CUDA device\n"


@pytest.mark.parametrize("package", gpu.PACKAGES)
def test_without_a_package_it_says_so_and_ends_well(
    package: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = gpu.PACKAGES[package]
    monkeypatch.setattr("unroll_bench.gpu.find_spec", lambda name: None if name == missing else find_spec(name))
    assert gpu.main([]) == 0
    assert capsys.readouterr().out == f"gpu: skipped: {package} is not installed\n"


def test_all_of_it_runs_on_the_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--device", "cpu", "--cells", "lstm", "--hidden", "8", "--lanes", "4", "--rounds", "1"]) == 0
    script, onnx, row = capsys.readouterr().out.splitlines()
    assert script.startswith("lstm, model.ts: 0.")
    assert onnx.startswith("lstm, model.onnx: 0.")
    assert row.startswith("lstm, hidden 8, 4 lanes: engine ")


@pytest.mark.parametrize("cell", gpu.NETWORKS)
def test_every_cell_is_measured(cell: str) -> None:
    assert min(gpu.rate(cell, "cpu", hidden=8, lanes=3, rounds=1)) > 0


def test_a_cell_that_computes_something_else_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(name: str, device: str) -> list[str]:
        raise ParityError("model.ts (cuda): is off from float64")

    monkeypatch.setattr(gpu, "parity", refuse)
    assert gpu.main(["--device", "cpu", "--cells", "gru", "--hidden", "--lanes"]) == 1
    assert capsys.readouterr().out == "gru: model.ts (cuda): is off from float64\n"
