"""Ids and labels: values that one format's reader accepts can be written and read back in every format."""

import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from unroll_proto.bundle import MOST_TEXT_BYTES
from unroll_proto.sequences import Sequence, SequenceError, read_sequences, write_sequences

WRITTEN = (".parquet", ".jsonl", ".ndjson", ".npz", ".ts")
VALUES = [[1.0, 2.0]]
# Any characters, with surrogates, and characters that formats use themselves.
TEXT = st.one_of(st.text(max_size=6), st.text('\0\r\n\t\x1c\x85\u2028\ufeff\ud800\udcff ",:?#@\\aä𝄞', max_size=6))
NAME = st.one_of(TEXT, st.integers(), st.none(), st.booleans(), st.floats(), st.lists(st.none(), max_size=1))
HOSTILE = ("\ud800", "a\0", "\r", "a\nb", "", "?", " ", "ä" * MOST_TEXT_BYTES)


def raw_utf8(names: list[str]) -> pa.Array:
    """A column of unchecked strings: surrogates become bytes that are not UTF-8."""
    parts = [name.encode(errors="surrogatepass") for name in names]
    offsets = np.cumsum([0, *map(len, parts)]).astype(np.int32)
    return pa.StringArray.from_buffers(len(parts), pa.py_buffer(offsets), pa.py_buffer(b"".join(parts)))


def make_jsonl(path: Path, names: list[object]) -> None:
    path.write_text("".join(json.dumps({"sequence": VALUES, "id": name, "label": name}) + "\n" for name in names))


def make_parquet(path: Path, names: list[object]) -> None:
    texts = raw_utf8([name if isinstance(name, str) else json.dumps(name) for name in names])
    pq.write_table(pa.table({"sequence": [VALUES] * len(names), "id": texts, "label": texts}), path)


def make_npz(path: Path, names: list[object]) -> None:
    texts = [name if isinstance(name, str) else json.dumps(name) for name in names]
    np.savez(path, values=np.array(VALUES * len(names)), lengths=[1] * len(names), labels=texts, ids=texts)


def make_ts(path: Path, names: list[object]) -> None:
    lines = "".join(f"1:2:{name}\n" for name in names)
    path.write_bytes(f"@classLabel true\n@data\n{lines}".encode(errors="surrogatepass"))


def accepted(path: Path) -> Iterator[Sequence]:
    """Returns the sequences up to the first error, which is one line with file and row."""
    refusal = None
    try:
        yield from read_sequences(path)
    except SequenceError as error:
        refusal = str(error)
    if refusal is not None:
        assert refusal.startswith(f"{path}: row ")
        assert len(refusal.splitlines()) == 1
        assert refusal.isprintable()


def fits_ts(label: str | None) -> bool:
    return label is None or (bool(label) and ":" not in label and label == "".join(label.split()))


MAKERS: dict[str, Callable[[Path, list[object]], None]] = {
    ".jsonl": make_jsonl,
    ".parquet": make_parquet,
    ".npz": make_npz,
    ".ts": make_ts,
}


@pytest.mark.parametrize("source", MAKERS)
@settings(max_examples=60)
@given(st.lists(NAME, min_size=1, max_size=3))
@example(list(HOSTILE))
@example([10**400])
def test_what_a_reader_accepts_every_writer_can_write(source: str, names: list[object]) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder, f"in{source}")
        MAKERS[source](path, names)
        sequences = list(accepted(path))
        for suffix in WRITTEN:
            some = sequences
            if suffix in (".npz", ".ts"):  # labels of all or of none
                some = [sequence for sequence in some if sequence.label is not None]
            if suffix == ".ts":
                some = [sequence for sequence in some if fits_ts(sequence.label)]
            written = Path(folder, f"out{suffix}")
            write_sequences(written, some)
            again = list(read_sequences(written))
            assert [sequence.label for sequence in again] == [sequence.label for sequence in some]
            if suffix != ".ts":
                assert [sequence.id for sequence in again] == [sequence.id for sequence in some]


@pytest.mark.parametrize("name", ["\ud800", "a\0b", "x" * (MOST_TEXT_BYTES + 1)], ids=["surrogate", "NUL", "long"])
@pytest.mark.parametrize("column", ["id", "label"])
def test_what_no_writer_could_write_is_refused_by_readers_and_writers(tmp_path: Path, name: str, column: str) -> None:
    for suffix, make in MAKERS.items():
        path = tmp_path / f"in{suffix}"
        make(path, ["fine", name])
        with pytest.raises(SequenceError, match=r": row [24]: "):
            list(read_sequences(path))
    values = np.array(VALUES, np.float32)
    for suffix in WRITTEN:
        given = {"id": "0", "label": "a"} | {column: name}
        with pytest.raises(SequenceError, match=f"out{suffix}: row 1: column '{column}': "):
            write_sequences(tmp_path / f"out{suffix}", [Sequence(values=values, **given)])  # type: ignore[arg-type]


def test_numbers_beyond_unicode_are_no_crash(tmp_path: Path) -> None:
    ids = np.array([ord("a"), 0x110000], np.uint32).view("<U1")
    np.savez(tmp_path / "f.npz", values=np.ones((2, 1)), lengths=[1, 1], ids=ids)
    with pytest.raises(SequenceError, match="row 2: column 'ids': not UTF-8 text"):
        list(read_sequences(tmp_path / "f.npz"))


def test_a_byte_changed_in_an_uncompressed_npz_is_no_crash(tmp_path: Path) -> None:
    path = tmp_path / "f.npz"
    make_npz(path, ["a"])
    good = path.read_bytes()
    for position in range(0, len(good), 11):
        path.write_bytes(good[:position] + bytes([good[position] ^ 0x21]) + good[position + 1 :])
        with suppress(SequenceError):
            list(read_sequences(path))


def test_parquet_groups_are_bounded_by_their_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unroll_proto.sequences.arrow.GROUP_VALUES", 10)
    sequences = [
        Sequence(str(index), np.full((steps, 2), index, np.float32)) for index, steps in enumerate((1, 4, 9, 1))
    ]
    write_sequences(tmp_path / "f.parquet", sequences)
    metadata = pq.read_metadata(tmp_path / "f.parquet")
    assert [metadata.row_group(index).num_rows for index in range(metadata.num_row_groups)] == [2, 1, 1]
    assert [sequence.values.shape for sequence in read_sequences(tmp_path / "f.parquet")] == [
        (1, 2),
        (4, 2),
        (9, 2),
        (1, 2),
    ]
