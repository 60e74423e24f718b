"""Bad sequence files: one line with file, row, column and problem."""

import pickle
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from unroll_proto.sequences import (
    Sequence,
    SequenceError,
    count_sequences,
    find_sources,
    read_sequences,
    write_sequences,
)

FLOATS = pa.list_(pa.list_(pa.float64()))


def error_of(path: Path) -> str:
    with pytest.raises(SequenceError) as caught:
        list(read_sequences(path))
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message.removeprefix(f"{path}: ")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "row 2: not JSON: "),
        ("[" * 100_000, "row 2: not JSON: "),
        ("[1]", "row 2: a JSON object expected, got a list"),
        ("null", "row 2: a JSON object expected, got null"),
        ('{"sequences": [[1, 2]]}', "row 2: column 'sequence': missing; the keys are ['sequences']"),
        ('{"sequence": null}', "row 2: column 'sequence': a list of lists of numbers expected, got null"),
        ('{"sequence": "1,2"}', "row 2: column 'sequence': a list of lists of numbers expected, got a string"),
        ('{"sequence": []}', "row 2: column 'sequence': an empty sequence"),
        ('{"sequence": [1, 2]}', "row 2: column 'sequence': 1 features, 2 expected as in the rows before"),
        ('{"sequence": [[1, 2], 3]}', "row 2: column 'sequence': [1] is a number, a list of numbers expected"),
        ('{"sequence": [[]]}', "row 2: column 'sequence': no features"),
        ('{"sequence": [[1, 2], [3]]}', "row 2: column 'sequence': [1] has 1 features, 2 expected as in [0]"),
        (
            '{"sequence": [[1, 2, 3]]}',
            "row 2: column 'sequence': 3 features, 2 expected as in the rows before",
        ),
        ('{"sequence": [[1, null]]}', "row 2: column 'sequence': [0][1] is null, a number expected"),
        ('{"sequence": [[1, "2"]]}', "row 2: column 'sequence': [0][1] is a string, a number expected"),
        ('{"sequence": [[1, true]]}', "row 2: column 'sequence': [0][1] is true, a number expected"),
        ('{"sequence": [[1, [2]]]}', "row 2: column 'sequence': [0][1] is a list, a number expected"),
        ('{"sequence": [[1, 2], [1, NaN]]}', "row 2: column 'sequence': [1][1] is nan, a finite number expected"),
        ('{"sequence": [[-Infinity, 2]]}', "row 2: column 'sequence': [0][0] is -inf, a finite number expected"),
        ('{"sequence": [[1e39, 2]]}', "row 2: column 'sequence': [0][0] is 1e+39, which is too large for float32"),
        (f'{{"sequence": [[1, {10**60}]]}}', "row 2: column 'sequence': [0][1] is too large for float32"),
        (f'{{"sequence": [[1, {10**400}]]}}', "row 2: column 'sequence': [0][1] is too large for float32"),
        ('{"sequence": [[1, 2]], "label": 1.5}', "row 2: column 'label': a string or an integer expected, got 1.5"),
        ('{"sequence": [[1, 2]], "label": [1]}', "row 2: column 'label': a string or an integer expected, got [1]"),
        ('{"sequence": [[1, 2]], "id": []}', "row 2: column 'id': a string or an integer expected, got []"),
        ('{"sequence": [[1, 2]], "split": "dev"}', "row 2: column 'split': 'dev' is none of train, validation, test"),
        (
            '{"sequence": [[1, 2]], "split": ["train"]}',
            "row 2: column 'split': a string or an integer expected, got ['train']",
        ),
    ],
)
def test_jsonl(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "f.jsonl"
    path.write_text(f'{{"sequence": [[1, 2]]}}\n{line}\n')
    assert error_of(path).startswith(message)


def test_jsonl_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "f.jsonl").write_bytes(b'{"sequence": [[1]], "label": "\xff"}\n')
    assert error_of(tmp_path / "f.jsonl").startswith("row 1: not UTF-8 text: ")


def test_rows_before_an_error_are_read(tmp_path: Path) -> None:
    (tmp_path / "f.jsonl").write_text('{"sequence": [[1]]}\nbroken\n')
    reading = read_sequences(tmp_path / "f.jsonl")
    assert next(reading).row == 1
    with pytest.raises(SequenceError):
        next(reading)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"label": ["a"]}, "no column 'sequence' and no column 'time', and [] are not steps such as x_0, x_1: "),
        ({"sequence": [1.0]}, "column 'sequence': a list of lists of numbers expected, got double"),
        ({"sequence": [[["a"]]]}, "column 'sequence': a list of lists of numbers expected, got list<"),
        ({"sequence": [[[True]]]}, "column 'sequence': a list of lists of numbers expected, got list<"),
        ({"sequence": [[[1.0]]], "label": [1.5]}, "row 1: column 'label': a string or an integer expected, got 1.5"),
        ({"sequence": [[[1.0]]], "id": [[1]]}, "column 'id': strings or integers expected, got list<"),
        ({"sequence": [[[1.0]]], "split": [1]}, "row 1: column 'split': '1' is none of train, validation, test"),
        ({"sequence": [[[1.0]]], "split": ["val"]}, "row 1: column 'split': 'val' is none of train, "),
        ({"sequence": [[[1.0]], None]}, "row 2: column 'sequence': null, a list of lists of numbers expected"),
        ({"sequence": [[[1.0]], []]}, "row 2: column 'sequence': an empty sequence"),
        ({"sequence": [[[1.0]], [[2.0], None]]}, "row 2: column 'sequence': [1] is null, a list of numbers"),
        ({"sequence": [[[1.0]], [[2.0], [None]]]}, "row 2: column 'sequence': [1][0] is null, a number expected"),
        ({"sequence": [[[1.0]], [[2.0], [1, 2]]]}, "row 2: column 'sequence': [1] has 2 features, 1 expected"),
        ({"sequence": [pa.scalar([[]], FLOATS)]}, "row 1: column 'sequence': no features"),
        ({"sequence": [[[1.0, 2.0]], [[2.0, 3.0], [1, np.inf]]]}, "row 2: column 'sequence': [1][1] is inf, "),
        ({"sequence": [[[1.0, 2.0], [np.nan, 2.0]]]}, "row 1: column 'sequence': [1][0] is nan, "),
        ({"sequence": [[[-1e300]]]}, "row 1: column 'sequence': [0][0] is -1e+300, which is too large for float32"),
    ],
)
def test_parquet(tmp_path: Path, columns: dict[str, Any], message: str) -> None:
    path = tmp_path / "f.parquet"
    pq.write_table(pa.table({name: pa.array(column) for name, column in columns.items()}), path)
    assert error_of(path).startswith(message)


def test_parquet_features_differ_between_batches(tmp_path: Path) -> None:
    path = tmp_path / "f.parquet"
    rows = pa.array([[[1.0, 2.0]]] * 20_000 + [[[1.0]]], FLOATS)
    pq.write_table(pa.table({"sequence": rows}), path)
    assert error_of(path).startswith("row 20001: column 'sequence': 1 features, 2 expected as in the rows before")


def test_parquet_with_two_columns_of_a_name(tmp_path: Path) -> None:
    path = tmp_path / "f.parquet"
    column = pa.array([[[1.0]]], FLOATS)
    pq.write_table(pa.Table.from_arrays([column, column], names=["sequence", "sequence"]), path)
    assert error_of(path) == "column 'sequence': there are 2 of it"


def damaged(path: Path) -> bytes:
    data = path.read_bytes()
    return data[: len(data) // 2]


@pytest.mark.parametrize("suffix", [".parquet", ".npz"])
def test_a_file_cut_off_is_no_crash(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"f{suffix}"
    write_sequences(path, [Sequence(str(index), np.ones((9, 3), np.float32)) for index in range(50)])
    path.write_bytes(damaged(path))
    error_of(path)
    if suffix == ".parquet":
        with pytest.raises(SequenceError):
            count_sequences(find_sources([path]))


@pytest.mark.parametrize("suffix", [".parquet", ".npz"])
def test_a_byte_changed_anywhere_is_no_crash(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"f{suffix}"
    write_sequences(path, [Sequence("0", np.ones((3, 2), np.float32), "a")])
    good = path.read_bytes()
    for position in range(0, len(good), 7):
        path.write_bytes(good[:position] + bytes([good[position] ^ 0x55]) + good[position + 1 :])
        with suppress(SequenceError):
            list(read_sequences(path))


VALUES = np.ones((4, 2), np.float32)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"values": VALUES}, "column 'lengths': missing"),
        ({"lengths": [4]}, "column 'values': missing"),
        ({"values": VALUES, "lengths": [1, 2]}, "column 'values': has 4 steps, but the lengths add up to 3"),
        ({"values": VALUES, "lengths": [4, 0]}, "row 2: column 'lengths': an empty sequence"),
        ({"values": VALUES, "lengths": [5, -1]}, "row 2: column 'lengths': -1 is not a length"),
        (
            {"values": VALUES, "lengths": np.array([2**63, 2**63, 4], np.uint64)},
            f"row 1: column 'lengths': {2**63} is not a length",
        ),
        ({"values": VALUES, "lengths": [4.0]}, "column 'lengths': integers [sequences] expected, got float64 [1]"),
        ({"values": VALUES, "lengths": 4}, "column 'lengths': integers [sequences] expected, got int64 []"),
        ({"values": VALUES[0], "lengths": [2]}, "column 'values': numbers [total steps, features] expected, got"),
        ({"values": VALUES.astype(str), "lengths": [4]}, "column 'values': numbers [total steps, features] expected"),
        ({"values": VALUES[:, :0], "lengths": [4]}, "row 1: column 'values': no features"),
        ({"values": VALUES * np.nan, "lengths": [4]}, "row 1: column 'values': [0][0] is nan"),
        ({"values": VALUES, "lengths": [4], "labels": ["a", "b"]}, "column 'labels': has 2 entries for 1 sequences"),
        (
            {"values": VALUES, "lengths": [4], "labels": [1.5]},
            "row 1: column 'labels': a string or an integer expected",
        ),
        ({"values": VALUES, "lengths": [4], "labels": [b"\xff"]}, "row 1: column 'labels': not UTF-8 text"),
        ({"values": VALUES, "lengths": [4], "ids": [["a"]]}, "column 'ids': strings or integers [sequences] expect"),
        ({"values": VALUES, "lengths": [4], "splits": ["dev"]}, "row 1: column 'splits': 'dev' is none of train"),
        ({"x": VALUES, "y": [4]}, "column 'values': missing; the arrays are ['x', 'y']"),
        ({}, "column 'values': missing; the archive is empty"),
        ({"arr_0": VALUES, "lengths": [4]}, "column 'values': missing; the arrays are ['arr_0', 'lengths']"),
    ],
)
def test_npz(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    np.savez(tmp_path / "f.npz", **arrays)
    assert error_of(tmp_path / "f.npz").startswith(message)


class Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return Path.touch, (self.path,)


def test_npz_is_never_unpickled(tmp_path: Path) -> None:
    labels = np.empty(1, object)
    labels[0] = Trap(tmp_path / "sprung")
    np.savez(tmp_path / "f.npz", values=VALUES, lengths=[4], labels=labels)
    assert error_of(tmp_path / "f.npz").startswith("column 'labels': an object array, which only pickle can load")
    (tmp_path / "g.npz").write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    assert error_of(tmp_path / "g.npz") == "not an npz archive"
    assert not (tmp_path / "sprung").exists()


def test_other_zip_files_are_told_from_npz(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "f.npz", "w") as archive:
        archive.writestr("word/document.xml", "<x/>")
    assert error_of(tmp_path / "f.npz") == "column 'values': missing; the arrays are ['word/document.xml']"
    np.savez(tmp_path / "g.npz", lengths=[2])
    with zipfile.ZipFile(tmp_path / "g.npz", "a") as archive:
        archive.writestr("values", "1,2")
    assert error_of(tmp_path / "g.npz") == "column 'values': not an array in numpy's format"


def test_npz_that_is_one_bare_array(tmp_path: Path) -> None:
    np.save(tmp_path / "f.npy", VALUES)
    (tmp_path / "f.npy").rename(tmp_path / "f.npz")
    assert error_of(tmp_path / "f.npz") == "one bare array, expected an archive with values and lengths; name it .npy"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no line '@data'"),
        ("@classLabel true a\n", "no line '@data'"),
        ("1,2:a\n", "row 1: a header line that starts with '@' expected, got '1,2:a'"),
        ("@classLabel maybe\n@data\n", "row 1: @classlabel: true or false expected, got 'maybe'"),
        ("@timeStamps true\n@data\n", "row 1: @timestamps true: such files can't be read here"),
        ("@targetLabel true\n@data\n", "row 1: @targetlabel true: such files can't be read here"),
        ("@dimensions x\n@data\n", "row 1: @dimensions: a number of 1 or more expected"),
        ("@classLabel true\n@data\n1,2:3,?:a\n", "row 3: column 'sequence': missing values ('?') can't be used"),
        ("@classLabel true\n@data\n1,2:3:a\n", "row 3: column 'sequence': dimension 1 has 1 values, 2 expected"),
        ("@classLabel true\n@data\n1,x:a\n", "row 3: column 'sequence': a number expected: "),
        ("@classLabel true\n@data\n1,,2:a\n", "row 3: column 'sequence': a number expected: "),
        ("@classLabel true\n@data\n1,nan:a\n", "row 3: column 'sequence': [1][0] is nan, a finite number expected"),
        ("@classLabel true\n@data\n1,2:\n", "row 3: column 'label': missing after the last ':'"),
        ("@classLabel true\n@data\n:a\n", "row 3: column 'sequence': an empty sequence"),
        ("@classLabel true\n@data\na\n", "row 3: column 'sequence': an empty sequence"),
        ("@classLabel true a b\n@data\n1,2:c\n", "row 3: column 'label': 'c' is not in the header"),
        ("@univariate true\n@data\n1:2\n", "row 3: column 'sequence': 2 dimensions, 1 expected by the header"),
        ("@dimensions 3\n@data\n1:2\n", "row 3: column 'sequence': 2 dimensions, 3 expected by the header"),
        ("@data\n1:2\n1:2:3\n", "row 3: column 'sequence': 3 features, 2 expected as in the rows before"),
    ],
)
def test_ts(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "f.ts").write_text(text)
    assert error_of(tmp_path / "f.ts").startswith(message)


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".npz", ".ts"])
def test_no_such_file(tmp_path: Path, suffix: str) -> None:
    assert error_of(tmp_path / f"NONE{suffix}") == "no such file or directory"
    (tmp_path / f"folder{suffix}").mkdir()
    assert error_of(tmp_path / f"folder{suffix}")


def test_an_unknown_suffix(tmp_path: Path) -> None:
    assert error_of(tmp_path / "f.xlsx").startswith("a file of kind .parquet, .arrow, .feather, .csv, .tsv, .jsonl, ")
    with pytest.raises(SequenceError, match="a file of kind"):
        count_sequences(find_sources([tmp_path / "f.xlsx"]))
    with pytest.raises(SequenceError, match="a file of kind"):
        write_sequences(tmp_path / "f.csv", [])


@pytest.mark.parametrize("labels", [("a b",), ("a:b",), ("",), ("a", None)])
def test_what_ts_cannot_hold_is_not_written(tmp_path: Path, labels: tuple[str | None, ...]) -> None:
    sequences = [Sequence(str(index), np.ones((1, 1), np.float32), label) for index, label in enumerate(labels)]
    with pytest.raises(SequenceError):
        write_sequences(tmp_path / "f.ts", sequences)
    assert list(tmp_path.iterdir()) == []
