"""`unroll` against real server processes: every format, readable tables, one-line errors, no partial files."""

import csv
import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from support.processes import BIN, PATIENCE, ServerProcess, run

from unroll_client import Client
from unroll_proto.sequences import Sequence, write_sequences


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, vowels: list[Sequence]) -> dict[str, Path]:
    """The test split in every format that is read."""
    folder = tmp_path_factory.mktemp("files")
    paths = {suffix: folder / f"vowels{suffix}" for suffix in (".parquet", ".jsonl", ".npz", ".ts")}
    for path in paths.values():
        write_sequences(path, vowels)
    return paths


@pytest.fixture(scope="module")
def expected(server: ServerProcess, vowels: list[Sequence]) -> list[dict[str, Any]]:
    """Results of the library for each sequence."""
    with Client(server.address) as client:
        result = client.classify([sequence.values for sequence in vowels])
    return [
        {
            "id": sequence.id,
            "label": result.labels[index],
            "probability": float(result.probabilities[index].max()),
            "probabilities": result.probabilities[index].tolist(),
            "logits": result.logits[index].tolist(),
        }
        for index, sequence in enumerate(vowels)
    ]


def unroll(server: ServerProcess, *words: str | Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = run("unroll", *words, check=False, env={"UNROLL_SERVER": server.address, "COLUMNS": "120"})
    assert done.returncode == code, done.stdout + done.stderr
    if code:
        assert len(done.stderr.splitlines()) == 1, done.stderr
        assert done.stderr.startswith("unroll: ")
    return done


def rows_of(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".parquet":
        rows: list[dict[str, Any]] = pq.read_table(path).to_pylist()
        return rows
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text().splitlines()]
    with path.open(newline="") as file:
        lists = {"probability", "probabilities", "logits"}
        return [
            {key: json.loads(value) if key in lists else value for key, value in row.items()}
            for row in csv.DictReader(file)
        ]


@pytest.mark.parametrize(
    ("source", "target"),
    [(".parquet", ".parquet"), (".jsonl", ".jsonl"), (".npz", ".csv"), (".ts", ".parquet")],
)
def test_classify_any_format(
    server: ServerProcess,
    files: dict[str, Path],
    expected: list[dict[str, Any]],
    tmp_path: Path,
    source: str,
    target: str,
) -> None:
    out = tmp_path / f"out{target}"
    done = unroll(server, "classify", files[source], "--model", "jv", "-o", out)
    assert rows_of(out) == expected
    assert list(tmp_path.iterdir()) == [out]
    assert "370 sequences classified by jv version 1" in done.stdout
    assert done.stderr == ""


def test_accuracy_and_confusion_matrix(
    server: ServerProcess,
    files: dict[str, Path],
    expected: list[dict[str, Any]],
    vowels: list[Sequence],
    tmp_path: Path,
) -> None:
    done = unroll(server, "classify", files[".parquet"], "-o", tmp_path / "out.csv")
    correct = sum(row["label"] == sequence.label for row, sequence in zip(expected, vowels, strict=True))
    assert f"accuracy {correct / 370:.4f}: {correct} of 370 sequences" in done.stdout
    matrix = [line.split() for line in done.stdout.splitlines()[-9:]]
    assert [row[0] for row in matrix] == list("123456789")
    for row in matrix:
        for said, count in zip("123456789", row[1:], strict=True):
            pairs = sum(
                sequence.label == row[0] and answer["label"] == said
                for answer, sequence in zip(expected, vowels, strict=True)
            )
            assert count == (str(pairs) if pairs or said == row[0] else ".")


def test_without_labels_there_is_no_accuracy(server: ServerProcess, vowels: list[Sequence], tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    write_sequences(path, [Sequence(sequence.id, sequence.values) for sequence in vowels[:3]])
    done = unroll(server, "classify", path)
    assert "accuracy" not in done.stdout + done.stderr
    assert [json.loads(line)["id"] for line in done.stdout.splitlines()] == ["0", "1", "2"]
    summary, labels = done.stderr.splitlines()
    assert summary.startswith("3 sequences classified by jv version 1, ")
    assert labels.startswith("labels: ")


def test_an_empty_file_gives_an_empty_one(server: ServerProcess, tmp_path: Path) -> None:
    write_sequences(tmp_path / "in.parquet", [])
    unroll(server, "classify", tmp_path / "in.parquet", "-o", tmp_path / "out.parquet")
    table = pq.read_table(tmp_path / "out.parquet")
    assert (table.num_rows, table.column_names) == (0, ["id", "label", "probability", "probabilities", "logits"])


def test_models(server: ServerProcess) -> None:
    table = unroll(server, "models").stdout.splitlines()
    assert table[1].split()[:2] == ["jv", "1"]
    (model,) = json.loads(unroll(server, "models", "--json").stdout)
    assert (model["name"], model["input_size"], model["limits"]["max_sequences"] > 0) == ("jv", 12, True)


@pytest.mark.parametrize("chunk", ["1", "4", "1000"])
def test_stream(server: ServerProcess, files: dict[str, Path], vowels: list[Sequence], chunk: str) -> None:
    values = vowels[3].values
    with Client(server.address) as client, client.unroll(logits=True) as sequence:
        steps = sequence.send(values)
    assert steps.states is not None
    words = ("stream", files[".ts"], "--model", "jv", "--index", "3", "--chunk", chunk)
    rows = [json.loads(line) for line in unroll(server, *words, "--format", "jsonl").stdout.splitlines()]
    assert [row["step"] for row in rows] == list(range(len(values)))
    assert np.array([row["state"] for row in rows], np.float32).tobytes() == steps.states.tobytes()
    table = unroll(server, *words, "--every", "5").stdout.splitlines()
    assert [line.split()[0] for line in table] == ["step", *map(str, range(4, len(values), 5))]
    assert table[1].split()[4] == f"{steps.states[4][0]:+.3f}"


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["classify", "none.parquet"], 2, "none.parquet: no such file or directory"),
        (["classify", "none.csv"], 2, "none.csv: no such file or directory"),
        (["classify", "VOWELS", "-o", "out.xlsx"], 2, "out.xlsx: a name that ends in .parquet, .jsonl, .ndjson, .csv"),
        (["classify", "VOWELS", "-o", "no/out.csv"], 2, "there is no folder no"),
        (["classify", "VOWELS", "--model", "zz", "-o", "out.csv"], 2, "'zz' is not served; choose from: jv"),
        (["classify", "VOWELS", "--model-version", "7", "-o", "out.csv"], 2, "jv/7 is not served"),
        (["classify", "NARROW", "-o", "out.csv"], 2, "row 1: column 'sequence': 2 features, model jv has 12"),
        (["classify", "BROKEN", "-o", "out.parquet"], 2, "row 3: column 'sequence': [1][0] is nan, a finite number"),
        (["classify", "VOWELS", "--server", "127.0.0.1:1", "-o", "out.csv"], 1, "no answer from 127.0.0.1:1: "),
        (
            ["models", "--server", "http://127.0.0.1:1"],
            2,
            "--server: HOST:PORT or unix:/PATH expected, got 'http://127",
        ),
        (["classify", "VOWELS", "--ca", "none.pem"], 2, "--ca: none.pem: no such file or directory"),
        (["models", "--server", "127.0.0.1:1"], 1, "no answer from 127.0.0.1:1: "),
        (["stream", "VOWELS", "--index", "370"], 2, "--index: 370, but"),
        (["stream", "NARROW"], 2, "row 1: column 'sequence': 2 features, model jv has 12"),
        (["stream", "VOWELS", "--chunk", "0"], 2, "--chunk"),
        (["classify"], 2, "Missing argument 'IN...'"),
        (["nosuch"], 2, "No such command 'nosuch'"),
    ],
)
def test_errors_are_one_line_and_leave_nothing(
    server: ServerProcess,
    files: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    code: int,
    says: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    narrow, broken = tmp_path / "narrow.jsonl", tmp_path / "broken.jsonl"
    write_sequences(narrow, [Sequence("0", np.ones((3, 2), np.float32))])
    rows = [[[1.0] * 12] * 3] * 2 + [[[1.0] * 12, [float("nan")] * 12]]
    broken.write_text("".join(json.dumps({"sequence": row}) + "\n" for row in rows))
    names = {"VOWELS": files[".ts"], "NARROW": narrow, "BROKEN": broken}
    done = unroll(server, *(names.get(word, word) for word in words), code=code)
    assert says in done.stderr
    assert done.stdout == ""
    assert {path.name for path in tmp_path.iterdir()} == {narrow.name, broken.name}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no full device here")
@pytest.mark.parametrize("words", [("models",), ("models", "--json"), ("classify", ""), ("stream", "")])
def test_a_full_disk_behind_standard_output_is_one_line(
    server: ServerProcess, files: dict[str, Path], words: tuple[str, ...]
) -> None:
    command = [BIN / "unroll", *(word or files[".jsonl"] for word in words)]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            command,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=PATIENCE,
            env={**os.environ, "UNROLL_SERVER": server.address},
            check=False,
        )
    assert (done.returncode, done.stderr) == (1, "unroll: no space left on device\n")


def test_without_a_standard_output(server: ServerProcess, files: dict[str, Path]) -> None:
    command = f"exec '{BIN}/unroll' classify '{files['.jsonl']}' >&-"
    done = subprocess.run(
        ["sh", "-c", command],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        env={**os.environ, "UNROLL_SERVER": server.address},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr


def test_the_input_is_not_overwritten(server: ServerProcess, vowels: list[Sequence], tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    write_sequences(path, vowels[:3])
    before = path.read_bytes()
    assert "is the input" in unroll(server, "classify", path, "-o", path, code=2).stderr
    assert path.read_bytes() == before


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory, vowels: list[Sequence]) -> Path:
    """A file that takes some seconds to classify."""
    path = tmp_path_factory.mktemp("large") / "large.parquet"
    copies = (Sequence(f"{copy}-{sequence.id}", sequence.values) for copy in range(24) for sequence in vowels)
    write_sequences(path, copies)
    return path


def begin(server: ServerProcess, large: Path, out: Path, *words: str) -> subprocess.Popen[str]:
    """Starts to classify, and waits until a part is written."""
    process = subprocess.Popen(
        [BIN / "unroll", "classify", large, "-o", out, "--server", server.address, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while process.poll() is None and not any(path.stat().st_size > 1000 for path in out.parent.iterdir()):
        os.sched_yield()
    assert process.poll() is None, process.communicate()
    return process


def test_an_interrupt_leaves_nothing(server: ServerProcess, large: Path, tmp_path: Path) -> None:
    process = begin(server, large, tmp_path / "out.jsonl")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, out, err.strip()) == (130, "", "unroll: interrupted")
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_dies_and_does_not_come_back(bundle_root: Path, large: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with ServerProcess(bundle_root, tmp_path / "log") as victim:
        process = begin(victim, large, tmp_path / "out" / "out.jsonl", "--timeout", "3")
        victim.signal(signal.SIGKILL)
        out, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, out, len(err.splitlines())) == (1, "", 1)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_server_that_is_restarted_meanwhile(
    server: ServerProcess, bundle_root: Path, large: Path, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    with ServerProcess(bundle_root, tmp_path / "log") as victim:
        process = begin(victim, large, tmp_path / "out" / "out.jsonl")
        victim.signal(signal.SIGKILL)
        victim.wait()
        with ServerProcess(bundle_root, tmp_path / "log2", "--listen", victim.address):
            _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, err
    unroll(server, "classify", large, "-o", tmp_path / "undisturbed.jsonl")
    assert (tmp_path / "out" / "out.jsonl").read_bytes() == (tmp_path / "undisturbed.jsonl").read_bytes()


def test_help_says_it_all() -> None:
    text = run("unroll", "--help").stdout
    assert all(word in text for word in ("models", "classify", "stream", "Exit codes"))
    for command in ("models", "classify", "stream"):
        text = run("unroll", command, "--help").stdout
        assert "UNROLL_SERVER" in text


def test_names_of_any_characters(server: ServerProcess, vowels: list[Sequence], tmp_path: Path) -> None:
    values = vowels[0].values
    write_sequences(tmp_path / "in.jsonl", [Sequence("[/]\x1b\r", values, "ä\n𝄞")])
    # The file's name has bytes that are not UTF-8.
    source, target = (Path(os.fsdecode(bytes(tmp_path) + name)) for name in (b"/[a]\xff.jsonl", b"/out\xff.csv"))
    (tmp_path / "in.jsonl").rename(source)
    env = {"UNROLL_SERVER": server.address, "PYTHONIOENCODING": "ascii:strict"}
    done = run("unroll", "classify", source, "-o", target, env=env)
    assert r"out\udcff.csv" in done.stdout
    assert [row["id"] for row in rows_of(target)] == ["[/]\x1b\r"]
    assert r"label in the file: ä\n𝄞" in run("unroll", "stream", source, env=env).stderr
    with source.open("a") as file:
        file.write(json.dumps({"sequence": values.tolist(), "id": "\ud800"}) + "\n")
    done = unroll(server, "classify", source, "-o", tmp_path / "none.csv", code=2)
    assert "row 2: column 'id': " in done.stderr
    assert not (tmp_path / "none.csv").exists()
