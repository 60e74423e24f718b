"""`unroll-export` on the command line: exit codes, one-line errors, output."""

from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from support.exports import run_of, write_run
from support.models import random_network
from support.processes import run

from unroll_engine.kernel import unavailable_reason
from unroll_export.export_cli import group
from unroll_export.exporting import export_run
from unroll_export.runs import load_run
from unroll_proto import bundle


@pytest.fixture(scope="module")
def run_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(run_of(random_network(1, 1, 1), longest_sequence=1), tmp_path_factory.mktemp("runs") / "made-up")


def test_exports_and_proves_again(run_path: Path, tmp_path: Path) -> None:
    out = tmp_path / "models" / "made-up"
    done = run("unroll-export", run_path, "--out", out, env={"FORCE_COLOR": "1"})  # as Jupyter sets it
    assert done.stderr == ""
    first, *table = done.stdout.splitlines()
    assert first == f"{out / '1'}: written, with proof"
    judged = [" ".join(line.split()[:2]) for line in table]
    kernel = ["not judged:"] if unavailable_reason() else ["model.onnx (kernel)"]
    assert sorted(judged) == sorted(["model.onnx (onnx)", "model.onnx (scan)", "model.ts (torchscript)", *kernel])
    bundle.verify_bundle(out / "1")

    again = run("unroll-export", "verify", out / "1")
    assert again.stdout.splitlines() == [f"{out / '1'}: proven on this machine", *table]


def fails(code: int, *words: str | Path) -> str:
    """Runs the command in this process and returns its one-line error."""
    result = CliRunner().invoke(group, [str(word) for word in words], standalone_mode=False)
    error = result.exception
    assert isinstance(error, click.ClickException), error
    assert error.exit_code == code
    assert result.output == ""
    assert "\n" not in error.format_message()
    return error.format_message()


def test_a_process_says_what_is_wrong_in_one_line(run_path: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    done = run("unroll-export", run_path, "--out", tmp_path / "file" / "jv", check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"unroll-export: {tmp_path / 'file' / 'jv'}: Not a directory\n"


def test_bad_input_is_one_line(run_path: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    assert "no training run here" in fails(2, tmp_path / "none", "--out", tmp_path / "jv")
    assert "model name '.jv'" in fails(2, run_path, "--out", tmp_path / ".jv")
    assert str(tmp_path / "file") in fails(2, run_path, "--out", tmp_path / "file" / "jv")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_bundle_that_does_not_hold_is_one_line_and_exit_1(run_path: Path, tmp_path: Path) -> None:
    out = tmp_path / "jv"
    export_run(load_run(run_path), out)
    (out / "1" / bundle.ONNX_RNN).write_bytes(b"")
    assert "model.onnx: 0 bytes" in fails(1, "verify", out / "1")
    assert "no such file" in fails(1, "verify", out)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "RUN is missing"),
        (["RUN"], "Missing option '--out'"),
        (["verify", "none"], "does not exist"),
        (["RUN", "--out", "jv", "--nope"], "No such option"),
    ],
)
def test_bad_usage_says_what_is_missing(words: list[str], message: str) -> None:
    assert message in fails(2, *words)


def test_help_shows_the_default_and_the_other_command() -> None:
    text = CliRunner().invoke(group, ["--help"]).output
    assert "--out" in text
    assert "verify" in text
