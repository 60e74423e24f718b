"""Night batches: refused rows, parts, and runs that are killed and resumed."""

import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.processes import PATIENCE
from unit.client.harness import MODEL, LocalServer

from unroll_proto.sequences import Sequence, write_sequences

# The command with small blocks and parts.
COMMAND = """
from unroll_client.cli import backends, main, outputs, parquet, results
backends.ServerBackend.block_size = backends.BlockSize(10, 1000)
outputs.GROUP_ROWS = parquet.GROUP_ROWS = results.GROUP_ROWS = 40
main()
"""
ROWS = 400


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two files with some rows that can't be used."""
    folder = tmp_path_factory.mktemp("inputs")
    random = np.random.default_rng(0)
    rows = [Sequence(f"s{index}", random.normal(size=(4, 3)).astype(np.float32)) for index in range(ROWS)]
    write_sequences(folder / "a.parquet", rows[:150])
    write_sequences(folder / "b.jsonl", rows[150:])
    lines = (folder / "b.jsonl").read_text().splitlines()
    lines[30:30] = lines[90:90] = ["{", '{"sequence": [[1, 2]]}']
    (folder / "b.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def start(server: LocalServer, *words: str | Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", COMMAND, "classify", *words, "--server", server.address],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == code, out + err
    return out + err


def contents(folder: Path) -> dict[str, bytes]:
    """Every file, but for the times in the mark of a finished folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "_SUCCESS"
    }


def test_rows_that_cannot_be_used(inputs: Path, tmp_path: Path) -> None:
    server = LocalServer(MODEL)
    out, bad = tmp_path / "out.jsonl", tmp_path / "bad.jsonl"
    assert "b.jsonl: row 31: not JSON" in finish(start(server, inputs, "-o", out), 2)
    assert list(tmp_path.iterdir()) == []
    said = finish(start(server, inputs, "-o", out, "--on-error", bad))
    assert f"{ROWS} sequences classified by m version 1, 4 refused (see {bad}), " in said
    assert [json.loads(line)["id"] for line in out.read_text().splitlines()] == [f"s{index}" for index in range(ROWS)]
    problems = [json.loads(line) for line in bad.read_text().splitlines()]
    assert [each["row"] for each in problems] == [31, 32, 91, 92]
    assert [each["column"] for each in problems] == [None, "sequence"] * 2
    (tmp_path / "none.csv").write_text("a\n1\n")
    assert "no row can be used" in finish(start(server, tmp_path / "none.csv", "--on-error", "skip"), 2)
    server.stop()


@pytest.mark.parametrize("name", ["out.parquet", "out.csv", "out"])
def test_a_run_that_is_killed_is_resumed(inputs: Path, name: str) -> None:
    server = LocalServer(MODEL)
    with TemporaryDirectory() as undisturbed:
        base = Path(undisturbed)
        finish(start(server, inputs, "-o", base / name, "--resume", "--on-error", base / "bad.jsonl"))
        finish(start(server, inputs, "-o", base / f"plain{name[3:]}", "--on-error", "skip"))
        expected = {key: data for key, data in contents(base).items() if not key.startswith("plain")}
        if name != "out":
            assert expected[name] == (base / f"plain{name[3:]}").read_bytes()

        @settings(max_examples=3, deadline=None, suppress_health_check=list(HealthCheck))
        @given(st.lists(st.integers(0, 9), min_size=1, max_size=2))
        def killed(parts: list[int]) -> None:
            with TemporaryDirectory() as made:
                folder = Path(made)
                words = (inputs, "-o", folder / name, "--resume", "--on-error", folder / "bad.jsonl")
                for part in parts:
                    process = start(server, *words)
                    while process.poll() is None and not list(folder.rglob(f"part-{part:05d}.*")):
                        pass
                    process.kill()
                    process.communicate()
                finish(start(server, *words))
                assert contents(folder) == expected

        killed()
    server.stop()


def test_a_folder_holds_one_run(inputs: Path, tmp_path: Path) -> None:
    server = LocalServer(MODEL)
    out = tmp_path / "out"
    finish(start(server, inputs / "a.parquet", "-o", out))
    assert sum(pq.read_metadata(path).num_rows for path in out.glob("part-*")) == 150
    assert "holds a finished run" in finish(start(server, inputs / "a.parquet", "-o", out), 2)
    assert "150 sequences" in finish(start(server, inputs / "a.parquet", "-o", out, "--resume"))
    assert "holds another run (files differ)" in finish(
        start(server, inputs / "b.jsonl", "-o", out, "--resume", "--on-error", "fail"), 2
    )
    server.stop()


def test_a_server_that_is_away_is_waited_for(inputs: Path, tmp_path: Path) -> None:
    server = LocalServer(MODEL)
    server.stop()
    words = (inputs, "-o", tmp_path / "out", "--on-error", "skip", "--wait", "60")
    process = start(server, *words)
    first = LocalServer(MODEL, port=server.port)
    while process.poll() is None and not list(tmp_path.rglob("part-*")):
        pass
    first.stop()
    second = LocalServer(MODEL, port=server.port)
    assert f"{ROWS} sequences" in finish(process)
    second.stop()
    assert sum(pq.read_metadata(path).num_rows for path in (tmp_path / "out").glob("part-*")) == ROWS


def test_standard_input(inputs: Path) -> None:
    server = LocalServer(MODEL)
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, "classify", "-", "--server", server.address],
        input=(inputs / "a.parquet").read_bytes(),
        capture_output=True,
        timeout=PATIENCE,
        check=True,
    )
    server.stop()
    assert [json.loads(line)["id"] for line in done.stdout.splitlines()] == [f"s{index}" for index in range(150)]
