"""Outputs: the same content in every format, and complete files or none."""

import csv
import dataclasses
import errno
import gc
import json
import os
from contextlib import AbstractContextManager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from unroll_client import Classification, Unavailable
from unroll_client.cli import parquet
from unroll_client.cli.outputs import COLUMNS, Output, file_errors, kind_of, to_terminal, writing
from unroll_proto.cli import InputError

SUFFIXES = [".parquet", ".jsonl", ".ndjson", ".csv"]


def to_file(path: Path) -> AbstractContextManager[Output]:
    return writing(path, kind_of(path))


def classification(seed: int, count: int, classes: int = 3) -> Classification:
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(count, classes)).astype(np.float32)
    probabilities = rng.random((count, classes), dtype=np.float32)
    indices = probabilities.argmax(axis=1)
    labels = [f'class "{index}", ä' for index in indices]
    return Classification(labels, indices, probabilities, logits, None, "jv", 1)


def expected_rows(parts: list[tuple[list[str], Classification]]) -> list[dict[str, Any]]:
    return [
        {
            "id": ids[index],
            "label": result.labels[index],
            "probability": float(result.probabilities[index].max()),
            "probabilities": result.probabilities[index].tolist(),
            "logits": result.logits[index].tolist(),
        }
        for ids, result in parts
        for index in range(len(ids))
    ]


def rows_of(path: Path) -> list[dict[str, Any]]:
    """Reads an output as users do; numbers are compared as exact float32."""
    if path.suffix == ".parquet":
        rows: list[dict[str, Any]] = pq.read_table(path).to_pylist()
        return rows
    with path.open(encoding="utf-8", newline="") as file:
        if path.suffix != ".csv":
            return [json.loads(line) for line in file]
        return [
            {
                **row,
                "probability": float(row["probability"]),
                "probabilities": json.loads(row["probabilities"]),
                "logits": json.loads(row["logits"]),
            }
            for row in csv.DictReader(file)
        ]


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("counts", [[], [1], [5, 3, 5]])
def test_what_is_written(tmp_path: Path, suffix: str, counts: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "GROUP_ROWS", 6)
    path = tmp_path / f"out{suffix}"
    parts = [
        ([f"{seed},{row}" for row in range(count)], classification(seed, count)) for seed, count in enumerate(counts)
    ]
    with to_file(path) as output:
        for ids, result in parts:
            output.write(ids, result)
        assert not path.exists()
    rows = rows_of(path)
    assert rows == expected_rows(parts)
    assert all(tuple(row) == COLUMNS for row in rows)
    assert list(tmp_path.iterdir()) == [path]
    assert path.stat().st_mode & 0o444


def test_parquet_is_written_in_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "GROUP_ROWS", 6)
    with to_file(tmp_path / "out.parquet") as output:
        for seed in range(4):
            output.write(list("abcde"), classification(seed, 5))
    metadata = pq.read_metadata(tmp_path / "out.parquet")
    assert [metadata.row_group(index).num_rows for index in range(metadata.num_row_groups)] == [10, 10]


def write_and_fail(path: Path) -> None:
    with to_file(path) as output:
        output.write(["a"], classification(0, 1))
        raise KeyboardInterrupt


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_failure_leaves_what_was_there(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"out{suffix}"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt):
        write_and_fail(path)
    gc.collect()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_where_nothing_can_be_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a name that ends in"):
        kind_of(tmp_path / "out.xls")


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with pytest.raises(click.ClickException) as caught, file_errors(path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "a temporary name")
    assert caught.value.message == f"{path}: no space left on device"
    assert caught.value.exit_code == 1


def test_an_error_of_the_server_is_none_of_the_file(tmp_path: Path) -> None:
    # Unavailable is an OSError as well.
    with pytest.raises(Unavailable), to_file(tmp_path / "out.jsonl"):
        raise Unavailable("gone")


def test_lines_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    to_terminal(as_json=False).write(["first", "second"], classification(1, 2))
    head, first, second = capsys.readouterr().out.splitlines()
    assert head.split() == ["id", "label", "probability"]
    assert first.startswith("first ")
    assert second.startswith("second ")


@settings(max_examples=60)
@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=6), min_size=1, max_size=3))
@example(["a\rb", "a\nb", "a\r\nb", '"', "", " ", "=1+1", "\ufeff", "\u2028", "\x1b[2J", "NULL", "nan"])
def test_every_id_and_label_that_a_reader_accepts_is_written(names: list[str]) -> None:
    result = classification(0, len(names))
    result = dataclasses.replace(result, labels=names[::-1])
    with TemporaryDirectory() as folder:
        for suffix in SUFFIXES:
            path = Path(folder, f"out{suffix}")
            with to_file(path) as output:
                output.write(names, result)
            assert rows_of(path) == expected_rows([(names, result)])


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_json_has_null_for_what_is_not_finite(tmp_path: Path, suffix: str) -> None:
    result = classification(0, 1)
    result.logits[0] = [np.nan, np.inf, 1]
    with to_file(tmp_path / f"out{suffix}") as output:
        output.write(["a"], result)
    (row,) = rows_of(tmp_path / f"out{suffix}")
    if suffix == ".parquet":
        np.testing.assert_array_equal(row["logits"], result.logits[0])
    else:
        assert row["logits"] == [None, None, 1]


def test_a_terminal_gets_one_line_without_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    result = dataclasses.replace(classification(1, 1), labels=["a\nb\x07"])
    to_terminal(as_json=False).write(["\x1b[2Jä\r"], result)
    _, line = capsys.readouterr().out.splitlines()
    assert line.split()[:2] == [r"\x1b[2Jä\r", r"a\nb\x07"]
