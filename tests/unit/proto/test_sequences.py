"""Sequence files: written values are read back bit for bit, in every format."""

import json
import string
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from unroll_proto.sequences import (
    SPLITS,
    Sequence,
    count_sequences,
    find_sources,
    read_blocks,
    read_sequences,
    write_sequences,
)

WRITTEN = (".parquet", ".jsonl", ".ndjson", ".npz", ".ts")
TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=8)
NAME = st.text(string.ascii_letters + string.digits + "-_äß", min_size=1, max_size=8)


@st.composite
def files(draw: st.DrawFn, plain: bool = False) -> list[Sequence]:
    """Sequences for one file; `plain` ones fit a .ts file."""
    features = draw(st.integers(1, 5))
    count = draw(st.integers(1, 6))
    shapes = st.integers(1, 7).map(lambda steps: (steps, features))
    numbers = st.floats(width=32, allow_nan=False, allow_infinity=False)
    labelled = draw(st.booleans())
    return [
        Sequence(
            id=str(index) if plain else draw(TEXT),
            values=draw(hnp.arrays(np.float32, shapes, elements=numbers)),
            label=draw(NAME if plain else TEXT) if labelled else None,
            split=None if plain else draw(st.sampled_from([*SPLITS, None])),
        )
        for index in range(count)
    ]


def same(left: Sequence, right: Sequence) -> bool:
    return (
        (left.id, left.label, left.split) == (right.id, right.label, right.split)
        and left.values.shape == right.values.shape
        and left.values.tobytes() == right.values.tobytes()
    )


def round_trip(sequences: list[Sequence], suffix: str) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / f"file{suffix}"
        assert write_sequences(path, iter(sequences)) == len(sequences)
        again = list(read_sequences(path))
        assert [path] == list(Path(folder).iterdir())
        assert count_sequences(find_sources([path])) in (None, len(sequences))
    assert len(again) == len(sequences)
    assert all(map(same, sequences, again))
    for sequence in again:
        assert sequence.values.dtype == np.float32
        assert sequence.values.flags.c_contiguous
        assert sequence.values.flags.writeable


@settings(max_examples=60)
@given(files(), st.sampled_from([".parquet", ".jsonl", ".npz"]))
def test_what_is_written_is_read(sequences: list[Sequence], suffix: str) -> None:
    # numpy drops trailing NULs, and a split is not free text; everything else is read back.
    round_trip(sequences, suffix)


@settings(max_examples=60)
@given(files(plain=True))
def test_what_is_written_as_ts_is_read(sequences: list[Sequence]) -> None:
    round_trip(sequences, ".ts")


def test_every_suffix_is_read_in_any_case(tmp_path: Path) -> None:
    for suffix in WRITTEN:
        path = tmp_path / f"file{suffix.upper()}"
        write_sequences(path, [Sequence("0", np.ones((2, 3), np.float32), "a")])
        assert [sequence.label for sequence in read_sequences(path)] == ["a"]


@pytest.mark.parametrize(
    "kind",
    [
        pa.list_(pa.list_(pa.float64())),
        pa.list_(pa.list_(pa.float16())),
        pa.list_(pa.list_(pa.int32())),
        pa.large_list(pa.large_list(pa.float32())),
        pa.list_(pa.list_(pa.float64(), 2)),
        pa.list_(pa.list_(pa.uint8(), 2), 3),
    ],
    ids=str,
)
def test_parquet_of_any_nested_type(tmp_path: Path, kind: pa.DataType) -> None:
    rows = [[[1, 2], [3, 4], [5, 6]], [[7, 8], [9, 10], [11, 12]]]
    pq.write_table(pa.table({"sequence": pa.array(rows, kind)}), tmp_path / "f.parquet")
    read = list(read_sequences(tmp_path / "f.parquet"))
    assert [sequence.values.tolist() for sequence in read] == rows
    assert [(sequence.id, sequence.label, sequence.row) for sequence in read] == [("0", None, 1), ("1", None, 2)]


def test_parquet_labels_of_any_type_and_null(tmp_path: Path) -> None:
    rows = pa.array([[[1.0]], [[2.0]], [[3.0]]], pa.list_(pa.list_(pa.float64())))
    for labels in (
        pa.array([1, None, 3], pa.int16()),
        pa.array(["1", None, "3"]),
        pa.array(["1", None, "3"]).dictionary_encode(),
        pa.array(["1", None, "3"], pa.large_string()),
    ):
        pq.write_table(pa.table({"sequence": rows, "label": labels, "id": [7, 8, 9]}), tmp_path / "f.parquet")
        read = list(read_sequences(tmp_path / "f.parquet"))
        assert [sequence.label for sequence in read] == ["1", None, "3"]
        assert [sequence.id for sequence in read] == ["7", "8", "9"]


@settings(max_examples=30)
@given(files(), st.integers(1, 4), st.integers(1, 3))
def test_parquet_is_the_same_in_any_row_groups_and_batches(
    sequences: list[Sequence], group_rows: int, batch_rows: int
) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "file.parquet"
        write_sequences(path, sequences)
        table = pq.read_table(path)
        pq.write_table(table.append_column("other", pa.nulls(len(table))), path, row_group_size=group_rows)
        (source,) = find_sources([path])
        again = [sequence for block in read_blocks(source, batch_rows, 1 << 19) for sequence in block]
    assert all(map(same, sequences, again))
    assert [sequence.row for sequence in again] == list(range(1, len(sequences) + 1))


@settings(max_examples=60)
@given(files(), st.sampled_from([".parquet", ".jsonl"]), st.integers(1, 9), st.integers(1, 60))
def test_blocks_hold_everything_once_in_order_and_little(
    sequences: list[Sequence], suffix: str, most: int, values: int
) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / f"file{suffix}"
        write_sequences(path, sequences)
        blocks = list(read_blocks(find_sources([path])[0], most, values))
    again = [sequence for block in blocks for sequence in block]
    assert len(again) == len(sequences)
    assert all(map(same, sequences, again))
    for block in blocks:
        assert 1 <= len(block) <= most
        assert len(block) == 1 or block.values.size <= values


def test_parquet_of_long_sequences_is_read_in_small_batches(tmp_path: Path) -> None:
    long = [Sequence(str(index), np.full((30, 2), index, np.float32)) for index in range(5)]
    write_sequences(tmp_path / "f.parquet", long)
    (source,) = find_sources([tmp_path / "f.parquet"])
    reading = (sequence for block in read_blocks(source, 1024, 100) for sequence in block)
    first = next(reading)
    # The batch that `first` is a view of holds one sequence only.
    assert first.values.base is not None
    assert first.values.base.size == first.values.size
    assert all(map(same, long, [first, *reading]))


def test_memory_does_not_grow_with_a_parquet_file(tmp_path: Path) -> None:
    path = tmp_path / "f.parquet"
    one = np.random.default_rng(0).normal(size=(600, 20)).astype(np.float32)
    write_sequences(path, (Sequence(str(index), one + index) for index in range(800)))
    # One row group of 38 MB, which a reader by row groups would hold.
    pq.write_table(pq.read_table(path), path, row_group_size=10_000)
    assert pq.read_metadata(path).num_row_groups == 1
    before = pa.total_allocated_bytes()
    peak = max(pa.total_allocated_bytes() for _ in read_sequences(path))
    assert peak - before < 20e6


def test_jsonl_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "f.ndjson"
    lines = [
        '\ufeff{"sequence": [[1, 2.5], [3e2, -4]], "label": 7, "id": 12, "split": "test", "more": {"x": 1}}',
        "",
        '{"label": "it is true", "sequence": [[0, 0]], "split": null}',
    ]
    path.write_text("\r\n".join(lines), encoding="utf-8")
    first, second = read_sequences(path)
    assert (first.id, first.label, first.split, first.row) == ("12", "7", "test", 1)
    assert first.values.tolist() == [[1, 2.5], [300, -4]]
    assert (second.id, second.label, second.split, second.row) == ("1", "it is true", None, 3)


def test_npz_by_hand(tmp_path: Path) -> None:
    values = np.arange(10, dtype=np.int64).reshape(5, 2)
    np.savez(tmp_path / "f.npz", values=values, lengths=np.array([2, 3], np.uint8), labels=np.array([b"x", b"y"]))
    first, second = read_sequences(tmp_path / "f.npz")
    assert first.values.tolist() == [[0, 1], [2, 3]]
    assert second.values.tolist() == [[4, 5], [6, 7], [8, 9]]
    assert (first.label, second.label, second.id, second.row) == ("x", "y", "1", 2)
    np.savez(tmp_path / "columns.npz", values=np.asfortranarray(values), lengths=[2, 3])
    assert [each.values.tolist() for each in read_sequences(tmp_path / "columns.npz")] == [
        first.values.tolist(),
        second.values.tolist(),
    ]


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_is_read_in_bounded_memory(tmp_path: Path, save: Callable[..., None]) -> None:
    values = np.arange(3_000_000, dtype=np.float64).reshape(-1, 3)
    save(tmp_path / "f.npz", values=values, lengths=[10_000] * 100)
    tracemalloc.start()
    try:
        total = sum(float(each.values.sum(dtype=np.float64)) for each in read_sequences(tmp_path / "f.npz"))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert total == values.sum()
    assert peak < values.nbytes / 2


def test_ts_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "f.ts"
    path.write_bytes(
        b"# a comment in Latin-1: \xe4\n@problemName x\n@Univariate false\n@dimensions 2\n@equalLength false\n"
        b"@classLabel true a b\n\n@DATA\n1,2,3:4,5,6:a\n# between\n7:-8e-1: b \n"
    )
    first, second = read_sequences(path)
    assert first.values.tolist() == [[1, 4], [2, 5], [3, 6]]
    assert second.values.tolist() == [[7, np.float32(-0.8)]]
    assert (first.label, second.label, first.row, second.row) == ("a", "b", 9, 11)


def test_ts_univariate_without_labels(tmp_path: Path) -> None:
    (tmp_path / "f.ts").write_text("@univariate true\n@classLabel false\n@data\n1, 2\n3,4,5\n")
    assert [sequence.values.ravel().tolist() for sequence in read_sequences(tmp_path / "f.ts")] == [[1, 2], [3, 4, 5]]


def test_empty_files_hold_no_sequences(tmp_path: Path) -> None:
    for suffix in WRITTEN:
        path = tmp_path / f"file{suffix}"
        write_sequences(path, [])
        assert list(read_sequences(path)) == []


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "f.jsonl"
    path.write_text("old")

    def broken() -> object:
        yield Sequence("0", np.ones((1, 1), np.float32))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_sequences(path, broken())  # type: ignore[arg-type] # a generator typed loosely
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_json_lines_are_plain_json(tmp_path: Path) -> None:
    write_sequences(tmp_path / "f.jsonl", [Sequence("ä", np.array([[0.5]], np.float32), "x", "train")])
    record = json.loads((tmp_path / "f.jsonl").read_text(encoding="utf-8"))
    assert record == {"id": "ä", "sequence": [[0.5]], "label": "x", "split": "train"}
