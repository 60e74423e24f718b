"""A killed and resumed run ends with the same bits, and its folder is always consistent."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from unroll_export import experiment, runs, sources
from unroll_export.runs import RunError, load_run
from unroll_export.training import Hyperparameters

SETTINGS = Hyperparameters(hidden_size=16, epochs=25, patience=25, batch_size=8, input_noise=0.1, seed=3)
LAG = 12


def train(out: Path, start: experiment.Start = "new", **settings: Any) -> dict[str, Any]:
    data = sources.recall(lag=LAG, seed=SETTINGS.seed)
    return experiment.run(data, Hyperparameters(**(vars(SETTINGS) | settings)), out, start)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(SETTINGS.threads)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run."""
    out = tmp_path_factory.mktemp("whole") / "run"
    train(out)
    return out


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run in a process that was killed after some epochs."""
    out = tmp_path_factory.mktemp("killed") / "run"
    options = {"data": "recall", "out": out, "lag": LAG}
    options |= {
        name.replace("_", "-"): getattr(SETTINGS, name)
        for name in ("hidden_size", "epochs", "patience", "batch_size", "input_noise", "seed")
    }
    command = [sys.executable, "-c", "from unroll_export.train_cli import main; main()"]
    command += [f"--{name}={value}" for name, value in options.items()]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        # A line every tenth epoch.
        for line in process.stderr:
            if line.startswith("epoch 10 "):
                break
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    return out


def scalars(out: Path, tag: str) -> list[int]:
    events = EventAccumulator(str(out))
    events.Reload()
    return [event.step for event in events.Scalars(tag)]


def test_a_killed_run_resumes_to_the_same_bits(whole: Path, killed: Path) -> None:
    assert not (killed / runs.SUMMARY).exists()
    with pytest.raises(RunError, match="has not finished"):
        load_run(killed)
    with pytest.raises(RunError, match="--resume continues it"):
        train(killed)
    with pytest.raises(RunError, match=r"began with seed 3, not 4; --resume"):
        train(killed, "resume", seed=4)
    reached = torch.load(killed / runs.CHECKPOINT, weights_only=True)["trainer"]["epoch"]
    assert 10 <= reached < SETTINGS.epochs
    train(killed, "resume")
    assert (killed / runs.WEIGHTS).read_bytes() == (whole / runs.WEIGHTS).read_bytes()
    summaries = [json.loads((out / runs.SUMMARY).read_text()) for out in (whole, killed)]
    for summary in summaries:
        del summary["created"]
    assert summaries[0] == summaries[1]
    assert scalars(killed, "loss/train") == scalars(whole, "loss/train") == list(range(1, summaries[0]["epochs"] + 1))


def test_a_finished_run_is_left_alone(whole: Path, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in whole.iterdir()}
    with pytest.raises(RunError, match="holds a finished run; --overwrite"):
        train(whole)
    with pytest.raises(RunError, match=r"began with hidden_size 16, not 17"):
        train(whole, "resume", hidden_size=17)
    summary = train(whole, "resume")
    assert summary == json.loads(before[runs.SUMMARY])
    assert {path.name: path.read_bytes() for path in whole.iterdir()} == before
    assert sorted(before)[0] == runs.CHECKPOINT
    assert not [name for name in before if name.endswith(".partial")]


def test_resuming_with_other_data_is_refused(whole: Path) -> None:
    with pytest.raises(RunError, match=r"began with lag 12, not 13"):
        experiment.run(sources.recall(lag=13, seed=3), SETTINGS, whole, "resume")
    with pytest.raises(RunError, match=r"began with data recall, not japanese-vowels"):
        experiment.run(sources.japanese_vowels(validation=0.1, seed=3), SETTINGS, whole, "resume")


def test_resuming_where_nothing_is_begins(tmp_path: Path) -> None:
    (tmp_path / ".checkpoint.pt.partial").write_bytes(b"left by a kill")
    summary = train(tmp_path, "resume", epochs=1)
    assert summary["epochs"] == 1
    assert sorted(path.name.partition(".")[0] for path in tmp_path.iterdir()) == [
        "checkpoint",
        "events",
        "summary",
        "weights",
    ]


def test_overwriting_replaces_the_run_and_nothing_else(tmp_path: Path) -> None:
    train(tmp_path, epochs=1)
    (tmp_path / "notes.txt").write_text("mine")
    first = load_run(tmp_path)
    summary = train(tmp_path, "overwrite", epochs=2)
    assert summary["epochs"] == 2
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert len(list(tmp_path.glob(runs.EVENTS))) == 1
    assert not torch.equal(load_run(tmp_path).model.fc.weight, first.model.fc.weight)


def test_a_folder_of_other_things_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    for start in ("new", "resume", "overwrite"):
        with pytest.raises(RunError, match=r"holds 'thesis.tex' but no training run"):
            train(tmp_path, start)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(RunError, match="is not a folder"):
        train(tmp_path / "thesis.tex")


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 cut off"])
def test_a_damaged_checkpoint_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / runs.CHECKPOINT).write_bytes(content)
    with pytest.raises(RunError, match=r"checkpoint.pt: not readable as a checkpoint") as caught:
        train(tmp_path, "resume")
    assert "\n" not in str(caught.value)
