"""Night batches: refused rows, parts, and runs that are killed and resumed."""

import asyncio
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.processes import PATIENCE
from support.s3_server import BUCKET, S3Server, needs_s3
from unit.client.gated import Gated
from unit.client.harness import MODEL, LocalServer

from unroll_proto.sequences import Sequence, write_sequences
from unroll_proto.v1.unroll_pb2_grpc import UnrollServiceServicer

# The command with small blocks and parts, and progress after each block.
COMMAND = """
from unroll_client.cli import backends, main, outputs, parquet, progress, results
progress.SECONDS = 0
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


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with S3Server(tmp_path_factory.mktemp("s3") / "log") as server:
        yield server


@pytest.fixture
def store(request: pytest.FixtureRequest) -> S3Server | None:
    """Where outputs go: to S3, or to local folders if None."""
    return request.getfixturevalue("s3") if request.param == "s3" else None


def start(address: str, *words: str | Path, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", COMMAND, "classify", *words, "--server", address],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **(env or {})},
    )


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == code, out + err
    return out + err


class Outputs:
    """A new folder of outputs, local or in S3.

    Args:
        folder: An empty folder, for a local one.
        store: The server of S3; None for a local folder.

    Attributes:
        base: Path or URL of the folder.
    """

    def __init__(self, folder: str, store: S3Server | None) -> None:
        self._folder, self._store, self._prefix = Path(folder), store, f"{Path(folder).name}/"
        self.base = f"s3://{BUCKET}/{Path(folder).name}" if store else folder
        self.env = store.env if store else {}

    def names(self) -> list[str]:
        """Every file, but for the mark of a finished folder, which has times in it."""
        if self._store:
            names = self._store.names(self._prefix)
        else:
            names = [str(path.relative_to(self._folder)) for path in self._folder.rglob("*") if path.is_file()]
        return [name for name in names if not name.endswith("_SUCCESS")]

    def contents(self) -> dict[str, bytes]:
        store = self._store
        return {
            name: store.get(self._prefix + name) if store else (self._folder / name).read_bytes()
            for name in self.names()
        }

    def wait_for_part(self, number: int, process: subprocess.Popen[str]) -> None:
        while process.poll() is None and not any(f"part-{number:05d}." in name for name in self.names()):
            pass


def test_rows_that_cannot_be_used(inputs: Path, tmp_path: Path) -> None:
    server = LocalServer(MODEL)
    out, bad = tmp_path / "out.jsonl", tmp_path / "bad.jsonl"
    assert "b.jsonl: row 31: not JSON" in finish(start(server.address, inputs, "-o", out), 2)
    assert list(tmp_path.iterdir()) == []
    said = finish(start(server.address, inputs, "-o", out, "--on-error", bad))
    shown = [line for line in said.splitlines() if re.fullmatch(r"\d+ sequences, \d+/s(, \d refused)?", line)]
    assert len(shown) == 41
    assert shown[-1].startswith(f"{ROWS + 4} sequences, ")
    assert shown[-1].endswith(", 4 refused")
    assert f"{ROWS} sequences classified by m version 1, 4 refused (see {bad}), " in said
    assert [json.loads(line)["id"] for line in out.read_text().splitlines()] == [f"s{index}" for index in range(ROWS)]
    problems = [json.loads(line) for line in bad.read_text().splitlines()]
    assert [each["row"] for each in problems] == [31, 32, 91, 92]
    assert [each["column"] for each in problems] == [None, "sequence"] * 2
    (tmp_path / "none.csv").write_text("a\n1\n")
    assert "no row can be used" in finish(start(server.address, tmp_path / "none.csv", "--on-error", "skip"), 2)
    server.stop()


@pytest.mark.parametrize(
    ("store", "name"),
    [
        ("local", "out.parquet"),
        ("local", "out"),
        pytest.param("s3", "out.csv", marks=needs_s3),
        pytest.param("s3", "out", marks=needs_s3),
    ],
    indirect=["store"],
)
def test_a_run_that_is_killed_is_resumed(inputs: Path, tmp_path: Path, store: S3Server | None, name: str) -> None:
    server = LocalServer(MODEL)

    def begin(outputs: Outputs, *words: str) -> subprocess.Popen[str]:
        files = (f"{outputs.base}/{name}", "--resume", "--on-error", f"{outputs.base}/bad.jsonl")
        return start(server.address, inputs, "-o", *files, *words, env=outputs.env)

    with TemporaryDirectory() as folder:
        undisturbed = Outputs(folder, store)
        finish(begin(undisturbed, "--concurrency", "64"))
        expected = undisturbed.contents()
    if name != "out":
        plain = tmp_path / name
        finish(start(server.address, inputs, "-o", plain, "--on-error", "skip", "--concurrency", "1"))
        assert expected[name] == plain.read_bytes()

    def killed(parts: list[int]) -> None:
        with TemporaryDirectory() as folder:
            outputs = Outputs(folder, store)
            for part in parts:
                process = begin(outputs)
                outputs.wait_for_part(part, process)
                process.kill()
                process.communicate()
            finish(begin(outputs))
            assert outputs.contents() == expected

    if store:
        killed([1, 6])
    else:
        points = st.lists(st.integers(0, 9), min_size=1, max_size=2)
        settings(max_examples=3, deadline=None, suppress_health_check=list(HealthCheck))(given(points)(killed))()
    server.stop()


async def test_of_two_processes_the_later_goes_on(
    inputs: Path, tmp_path: Path, script: Callable[[UnrollServiceServicer], str]
) -> None:
    servicer = Gated()
    address = script(servicer)
    words = (inputs, "-o", tmp_path / "out", "--resume", "--on-error", "skip", "--concurrency", "1")
    first = start(address, *words)
    await servicer.until(1)
    second = start(address, *words)
    await servicer.until(2)
    servicer.gate.set()
    assert "another process writes it" in await asyncio.to_thread(finish, first, 2)
    await asyncio.to_thread(finish, second)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "_SUCCESS",
        *(f"part-{number:05d}.parquet" for number in range(10)),
    ]


@needs_s3
def test_a_bucket_that_is_not_there_ends_the_start(inputs: Path, s3: S3Server) -> None:
    server = LocalServer(MODEL)
    said = finish(start(server.address, inputs, "-o", "s3://none/out.csv", env=s3.env), 1)
    assert said == "unroll: s3://none/.out.csv.parts: the specified bucket does not exist\n"
    server.stop()


@pytest.mark.parametrize("concurrency", [1, 7])
async def test_so_many_requests_are_in_flight(
    inputs: Path, tmp_path: Path, script: Callable[[UnrollServiceServicer], str], concurrency: int
) -> None:
    servicer = Gated()
    words = ("-o", tmp_path / "out.jsonl", "--concurrency", str(concurrency))
    process = start(script(servicer), inputs / "a.parquet", *words)
    await servicer.until(concurrency)
    servicer.gate.set()
    await asyncio.to_thread(finish, process)
    assert servicer.most_in_flight == concurrency
    rows = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    assert [row["id"] for row in rows] == [f"s{index}" for index in range(150)]


def test_a_folder_holds_one_run(inputs: Path, tmp_path: Path) -> None:
    server = LocalServer(MODEL)
    out = tmp_path / "out"
    said = finish(start(server.address, inputs / "a.parquet", "-o", out))
    assert re.search(r"^100 of 150 sequences, \d+/s, \d+ s left$", said, re.MULTILINE)
    assert sum(pq.read_metadata(path).num_rows for path in out.glob("part-*")) == 150
    assert "holds a finished run" in finish(start(server.address, inputs / "a.parquet", "-o", out), 2)
    assert "150 sequences" in finish(start(server.address, inputs / "a.parquet", "-o", out, "--resume"))
    assert "holds another run (files differ)" in finish(
        start(server.address, inputs / "b.jsonl", "-o", out, "--resume", "--on-error", "fail"), 2
    )
    server.stop()


def test_a_server_that_is_away_is_waited_for(inputs: Path, tmp_path: Path) -> None:
    server = LocalServer(MODEL)
    server.stop()
    words = (inputs, "-o", tmp_path / "out", "--on-error", "skip", "--wait", "60")
    process = start(server.address, *words)
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
