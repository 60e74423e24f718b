"""Formats and layouts of sequence files: tables in every layout, compressed text, folders of parts, remote files."""

import gzip
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.feather as pf
import pyarrow.parquet as pq
import pytest
from support.s3_server import BUCKET, S3Server, needs_s3

from unroll_proto.sequences import (
    Block,
    Columns,
    Expected,
    Sequence,
    SequenceError,
    find_sources,
    read_blocks,
    read_sequences,
    write_sequences,
)

LONG = "id,time,x,y,label\na,2,1,2,L\na,1,3,4,L\nb,1,5,6,M\n"


def blocks_of(path: Path | str, **options: Any) -> list[Block]:
    return [block for source in find_sources([path]) for block in read_blocks(source, 1024, 1 << 19, **options)]


def read(path: Path | str, **options: Any) -> list[tuple[str, list[list[float]], str | None]]:
    return [(each.id, each.values.tolist(), each.label) for block in blocks_of(path, **options) for each in block]


def refusals(path: Path, **options: Any) -> list[str]:
    return [str(error).removeprefix(f"{path}: ") for block in blocks_of(path, **options) for error in block.refused]


@pytest.mark.parametrize("name", ["f.csv", "f.tsv", "f.csv.gz", "f.csv.zst", "part-00000"])
def test_a_row_for_each_timestep(tmp_path: Path, name: str) -> None:
    data = (LONG.replace(",", "\t") if name == "f.tsv" else LONG).encode()
    path = tmp_path / name
    if name.endswith(".gz"):
        data = gzip.compress(data)
    elif name.endswith(".zst"):
        data = pa.compress(data, codec="zstd", asbytes=True)
    path.write_bytes(data)
    assert read(path) == [("a", [[3, 4], [1, 2]], "L"), ("b", [[5, 6]], "M")]
    assert blocks_of(path)[0].features == ("x", "y")
    swapped = Columns(features=("y", "x"))
    expected = Expected(("y", "x"), "model m")
    assert (
        read(path, columns=swapped)
        == read(path, expected=expected)
        == [
            ("a", [[4, 3], [2, 1]], "L"),
            ("b", [[6, 5]], "M"),
        ]
    )


def test_what_is_wrong_with_a_timestep_is_wrong_with_its_sequence(tmp_path: Path) -> None:
    path = tmp_path / "f.csv"
    rows = [
        "b,2,x,1,M",
        "c,1,,1,N",
        "d,1,1,1,O",
        "d,1,2,2,O",
        "e,1,1,1,P",
        "bad",
        "a,3,1,1,L",
        "g,1,1,1,",
        "h,1,1e39,1,",
    ]
    path.write_text(LONG + "\n".join(rows) + "\n")
    assert [name for name, _, _ in read(path)] == ["a", "g"]
    assert refusals(path) == [
        "row 5: column 'x': 'x' is not a number",
        "row 6: column 'x': no number",
        "row 8: column 'time': the time of another row of the sequence",
        "row 10: 1 values, 5 expected as in the first row",
        "row 11: column 'id': 'a' comes again after other ids; sort the file by it",
        "row 13: column 'x': 1e+39, which is too large for float32",
    ]
    with pytest.raises(SequenceError, match="row 5: column 'x': 'x' is not a number"):
        list(read_sequences(path))


def test_a_column_for_each_step(tmp_path: Path) -> None:
    path = tmp_path / "f.csv"
    path.write_text("id;x_0;x_1;y_0;y_1;label\na;1;2;3;4;1\nb;5;;6;;0\nc;;1;2;3;\n")
    assert read(path) == [("a", [[1, 3], [2, 4]], "1"), ("b", [[5, 6]], "0")]
    assert refusals(path) == ["row 4: column 'x_0': no number, but later steps have one"]
    (tmp_path / "ucr.tsv").write_text("1\t0.5\t2\n2\t0.25\tNaN\n")
    columns = Columns(label="0")
    assert read(tmp_path / "ucr.tsv", columns=columns) == [("0", [[0.5], [2]], "1"), ("1", [[0.25]], "2")]


def test_labels_and_lists_as_pandas_writes_them(tmp_path: Path) -> None:
    tensors = pa.FixedShapeTensorArray.from_numpy_ndarray(np.arange(12, dtype=np.float32).reshape(2, 3, 2))
    pq.write_table(pa.table({"sequence": tensors, "label": [True, False]}), tmp_path / "t.parquet")
    assert [(len(values), label) for _, values, label in read(tmp_path / "t.parquet")] == [(3, "true"), (3, "false")]
    flat = pa.array([[1, 2], [3]], pa.list_(pa.decimal128(5, 1)))
    pf.write_feather(pa.table({"series": flat, "label": pa.array([1.0, None])}), tmp_path / "f.feather")
    columns = Columns(sequence="series")
    assert read(tmp_path / "f.feather", columns=columns) == [("0", [[1], [2]], "1"), ("1", [[3]], None)]
    (tmp_path / "f.csv").write_text('id,sequence\n7,"[[1, 2], [3, 4]]"\n')
    assert read(tmp_path / "f.csv") == [("7", [[1, 2], [3, 4]], None)]
    np.save(tmp_path / "f.npy", np.array([[1, 2], [3, np.nan]]))
    assert read(tmp_path / "f.npy") == [("0", [[1], [2]], None), ("1", [[3]], None)]
    (tmp_path / "f.jsonl").write_text('{"id": 1, "time": 1, "x": 2}\n{"id": 1, "time": 2, "x": 3}\n')
    assert read(tmp_path / "f.jsonl") == [("1", [[2], [3]], None)]


def test_folders_of_parts(tmp_path: Path) -> None:
    for key in ("a b", "c"):
        folder = tmp_path / "data" / f"label={key.replace(' ', '%20')}"
        folder.mkdir(parents=True)
        write_sequences(folder / "part-0.jsonl", [Sequence("i", np.ones((1, 1), np.float32))])
        (folder / "_SUCCESS").touch()
        (folder / ".part-0.jsonl.crc").touch()
        (folder / "part-1.csv").write_text("x_0\n2\n")
    found = read(tmp_path / "data")
    assert [(name.rpartition("/")[2], label) for name, _, label in found] == [
        ("i", "a b"),
        ("part-1.csv:0", "a b"),
        ("i", "c"),
        ("part-1.csv:0", "c"),
    ]
    assert read(str(tmp_path / "data" / "*" / "part-0.*")) == [found[0], found[2]]


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("f.csv", "a,b\n1,2\n", "no column 'sequence' and no column 'time', and ['a', 'b'] are not steps"),
        ("f.csv.gz", "a", "damaged or cut off"),
        ("f.csv.zst", "a", "damaged or cut off"),
        ("f.npy", "a", "not a readable npy"),
        ("f.feather", "a", "not readable Arrow"),
    ],
)
def test_a_file_that_cannot_be_used(tmp_path: Path, name: str, text: str, says: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(SequenceError) as caught:
        read(tmp_path / name)
    assert says in str(caught.value)
    (tmp_path / "g.csv").write_text(LONG)
    with pytest.raises(SequenceError, match="missing; the columns are"):
        read(tmp_path / "g.csv", columns=Columns(time="when"))


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".npz", ".ts", ".csv"])
def test_what_was_done_is_left_out(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"f{suffix}"
    if suffix == ".csv":
        path.write_text("id,time,x\n" + "".join(f"{index},{step},1\n" for index in range(9) for step in range(2)))
    else:
        write_sequences(path, [Sequence(str(index), np.ones((2, 1), np.float32)) for index in range(9)])
    (source,) = find_sources([path])
    for skip in (0, 4, 9):
        found = [each.id for block in read_blocks(source, 2, 1000, skip=skip) for each in block]
        assert found == [str(index) for index in range(skip, 9)]


@needs_s3
@pytest.mark.filterwarnings("ignore")  # of the libraries
def test_files_of_s3_and_http(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with S3Server(tmp_path / "s3.log") as server:
        for name, value in server.env.items():
            monkeypatch.setenv(name, value)
        write_sequences(tmp_path / "f.parquet", [Sequence("a", np.ones((2, 3), np.float32), "L")])
        for name, data in (("f.parquet", (tmp_path / "f.parquet").read_bytes()), ("g.csv", LONG.encode())):
            server.put(f"in/{name}", data, ACL="public-read")
        server.put("in/_SUCCESS", b"")
        url = f"s3://{BUCKET}/in"
        assert [name for name, _, _ in read(url)] == ["a", "a", "b"]
        assert [name for name, _, _ in read(f"{url}/*.csv")] == ["a", "b"]
        for name in ("f.parquet", "g.csv"):
            assert read(f"{server.env['AWS_ENDPOINT_URL']}/{BUCKET}/in/{name}") == read(f"{url}/{name}")
        (source,) = find_sources([f"{url}/g.csv"])
        assert source.stamp.startswith(f"{len(LONG)} ")
        with pytest.raises(SequenceError, match=f"s3://{BUCKET}/none: "):
            read(f"s3://{BUCKET}/none")
