"""Sequences over the limits of a real server: split by the client and the command, with the same bits."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from support.processes import ServerProcess, run

from unroll_client import Client
from unroll_proto.sequences import Sequence, write_sequences

LONG = 100_000


@pytest.fixture(scope="module")
def roomy(bundle_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    log = tmp_path_factory.mktemp("roomy") / "log"
    with ServerProcess(bundle_root, log, "--max-message-bytes", str(1 << 26), tuning={"max_steps": LONG}) as process:
        yield process


@pytest.fixture(scope="module")
def narrow(bundle_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    log = tmp_path_factory.mktemp("narrow") / "log"
    tuning = {"max_steps": 3000, "max_sequences": 3}
    with ServerProcess(bundle_root, log, "--max-message-bytes", str(1 << 17), tuning=tuning) as process:
        yield process


@pytest.fixture(scope="module")
def mixture(vowels: list[Sequence]) -> list[NDArray[np.float32]]:
    """Sequences of 20 to 100,000 steps of real data."""
    everything = np.concatenate([sequence.values for sequence in vowels])
    everything = np.tile(everything, (LONG // len(everything) + 1, 1))
    return [everything[start : start + steps] for start, steps in enumerate([20, 3001, LONG, 3000, 7000, 20, 1])]


def test_a_call(roomy: ServerProcess, narrow: ServerProcess, mixture: list[NDArray[np.float32]]) -> None:
    with Client(roomy.address, timeout=300) as client:
        begun = client.classify([values[:1] for values in mixture], return_final_states=True)
        expected = client.classify(mixture, initial_states=begun.final_states, return_final_states=True)
    assert [state.step for state in expected.final_states or ()] == [1 + len(values) for values in mixture]
    with Client(narrow.address, timeout=300) as client:
        assert client.model().limits.max_steps == 3000
        result = client.classify(mixture, initial_states=begun.final_states, return_final_states=True)
    assert result.labels == expected.labels
    assert result.logits.tobytes() == expected.logits.tobytes()
    assert result.probabilities.tobytes() == expected.probabilities.tobytes()
    assert result.final_states == expected.final_states


def test_a_session(roomy: ServerProcess, narrow: ServerProcess, mixture: list[NDArray[np.float32]]) -> None:
    values = mixture[4]
    with Client(roomy.address, timeout=300) as client:
        expected = client.advance("long", values, start=True, logits=True, return_snapshot=True)
    with Client(narrow.address, timeout=300) as client:
        result = client.advance("long", values, start=True, first_step=0, logits=True, return_snapshot=True)
        assert (result.first_step, result.count, result.step) == (0, len(values), len(values))
        assert client.advance("long", mixture[0]).first_step == 7000
    for name in ("states", "logits", "probabilities"):
        assert getattr(result, name).tobytes() == getattr(expected, name).tobytes()
    assert (result.label, result.snapshot) == (expected.label, expected.snapshot)


def test_the_commands(
    server: ServerProcess,
    roomy: ServerProcess,
    narrow: ServerProcess,
    mixture: list[NDArray[np.float32]],
    tmp_path: Path,
) -> None:
    file = tmp_path / "long.parquet"
    write_sequences(file, [Sequence(str(index), values, None, None, 0) for index, values in enumerate(mixture)])
    classes, steps = [], []
    for process in (roomy, narrow, server):
        env = {"UNROLL_SERVER": process.address}
        classes.append(run("unroll", "classify", file, "--timeout", "300", env=env).stdout)
        words = ("--index", "4", "--chunk", "7000", "--every", "500", "--format", "jsonl")
        steps.append(run("unroll", "stream", file, *words, env=env).stdout)
    assert [json.loads(line)["id"] for line in classes[0].splitlines()] == [str(index) for index in range(len(mixture))]
    assert [json.loads(line)["step"] for line in steps[0].splitlines()] == list(range(499, 7000, 500))
    assert classes == classes[:1] * 3
    assert steps == steps[:1] * 3
