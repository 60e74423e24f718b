"""Data sets: sources, splits, labels, standardization, refusals."""

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Sequence as Rows
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from unroll_export import sources
from unroll_export.datasets import Dataset, Part, held_out, natural_order
from unroll_proto.sequences import SequenceError

RANDOM = np.random.default_rng(7)
VALUES = [RANDOM.standard_normal((2 + i % 5, 3)).astype(np.float32) for i in range(30)]
LABELS = ["10", "9", "100"] * 10


def write(
    path: Path, values: list[np.ndarray], labels: Rows[str | None], splits: Rows[str | None] | None = None
) -> Path:
    """Writes a data set in the format of the suffix."""
    nested = [value.tolist() for value in values]
    table = {"sequence": nested, "label": labels} | ({"split": splits} if splits else {})
    if path.suffix == ".parquet":
        pq.write_table(pa.table(table), path)
    elif path.suffix == ".jsonl":
        rows = [dict(zip(table, row, strict=True)) for row in zip(*table.values(), strict=True)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".npz":
        np.savez(path, values=np.concatenate(values), lengths=[len(v) for v in values], labels=np.array(labels))
    elif path.suffix == ".ts":
        lines = [":".join(",".join(map(repr, d)) for d in v.T.tolist()) for v in values]
        data = "".join(f"{line}:{label}\n" for line, label in zip(lines, labels, strict=True))
        path.write_text(f"@dimensions 3\n@classLabel true {' '.join(sorted(set(map(str, labels))))}\n@data\n{data}")
    return path


def load(path: Path, validation: float = 0.1, test: float = 0.2, seed: int = 0) -> Dataset:
    return sources.from_file(path, validation=validation, test=test, seed=seed)


def contents(part: Part) -> Counter[tuple[int, bytes]]:
    return Counter((int(label), x.numpy().tobytes()) for x, label in zip(part.sequences, part.labels, strict=True))


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".npz", ".ts"])
def test_every_format_gives_the_same_data(tmp_path: Path, suffix: str) -> None:
    data = load(write(tmp_path / f"data{suffix}", VALUES, LABELS))
    assert data.name == f"data{suffix}"
    assert data.sha256 == hashlib.sha256((tmp_path / data.name).read_bytes()).hexdigest()
    assert data.class_labels == ("9", "10", "100")
    assert data.feature_names == ("feature_1", "feature_2", "feature_3")
    assert (len(data.train), len(data.validation), len(data.test)) == (21, 3, 6)
    index = {"9": 0, "10": 1, "100": 2}
    given_rows = Counter((index[label], value.tobytes()) for value, label in zip(VALUES, LABELS, strict=True))
    assert contents(data.train) + contents(data.validation) + contents(data.test) == given_rows


def test_held_out_sequences_depend_on_the_seed_alone(tmp_path: Path) -> None:
    path = write(tmp_path / "data.parquet", VALUES, LABELS)
    assert contents(load(path, seed=3).test) == contents(load(path, seed=3).test)
    assert contents(load(path, seed=3).test) != contents(load(path, seed=4).test)


def test_splits_of_the_file_are_kept(tmp_path: Path) -> None:
    splits = ["test"] * 6 + ["validation"] * 3 + ["train"] * 15 + [None, None, None, None, None, None]
    data = load(write(tmp_path / "data.jsonl", VALUES, LABELS, splits))
    assert [len(part) for part in (data.train, data.validation, data.test)] == [21, 3, 6]
    assert all(torch.equal(torch.tensor(v), x) for v, x in zip(VALUES[:6], data.test.sequences, strict=True))
    assert all(torch.equal(torch.tensor(v), x) for v, x in zip(VALUES[6:9], data.validation.sequences, strict=True))


def test_validation_is_taken_from_the_training_sequences_only(tmp_path: Path) -> None:
    splits = ["train"] * 15 + ["test"] * 15
    data = load(write(tmp_path / "data.jsonl", VALUES, LABELS, splits), validation=0.2)
    test_rows = {value.tobytes() for value in VALUES[15:]}
    assert len(data.validation) == 3
    assert not test_rows & {x.numpy().tobytes() for x in (*data.validation.sequences, *data.train.sequences)}


def test_a_test_file_is_the_test_split(tmp_path: Path) -> None:
    train = write(tmp_path / "a_TRAIN.ts", VALUES[:15], LABELS[:15])
    test = write(tmp_path / "a_TEST.ts", VALUES[15:], LABELS[15:])
    data = sources.from_file(train, test, validation=0, test=0.2, seed=0)
    assert (len(data.train), len(data.validation), len(data.test)) == (15, 0, 15)
    assert data.sha256 == hashlib.sha256(train.read_bytes() + test.read_bytes()).hexdigest()
    narrow = write(tmp_path / "narrow.jsonl", [value[:, :2] for value in VALUES], LABELS)
    with pytest.raises(SequenceError, match=r"narrow.jsonl: row 1: column 'sequence': 2 features, 3 expected"):
        sources.from_file(train, narrow, validation=0, test=0, seed=0)


@pytest.mark.parametrize(
    ("labels", "splits", "message"),
    [
        (["a"] * 3, None, "row 1: column 'label': 'a' is the only class"),
        (["a", "b", "c"], ["train", "train", "test"], "row 3: column 'label': no training sequence is of class 'c'"),
        (["a", "b", "a"], ["test"] * 3, "column 'split': no sequence is of the train split"),
        (["a", None, "b"], None, "row 2: column 'label': missing"),
    ],
)
def test_what_can_not_be_trained_on_is_refused(
    tmp_path: Path, labels: list[str | None], splits: list[str | None] | None, message: str
) -> None:
    path = write(tmp_path / "data.jsonl", VALUES[:3], labels, splits)
    with pytest.raises(SequenceError) as caught:
        load(path, test=0, validation=0)
    assert str(caught.value).startswith(f"{path}: {message}")
    assert "\n" not in str(caught.value)


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text("")
    with pytest.raises(SequenceError, match="holds no sequences"):
        load(tmp_path / "data.jsonl")


def test_labels_are_sorted_naturally() -> None:
    assert natural_order({"10", "9", "-1", "+2"}) == ("-1", "+2", "9", "10")
    assert natural_order({"word10", "word9", "word", "10", "2x"}) == ("2x", "10", "word", "word9", "word10")


@given(st.sets(st.text(max_size=6), max_size=8))
def test_any_labels_have_one_order(labels: set[str]) -> None:
    ordered = natural_order(labels)
    assert set(ordered) == labels
    assert natural_order(set(ordered)) == ordered


@given(
    st.lists(st.sampled_from("abc"), max_size=60),
    st.floats(0, 0.99),
    st.integers(0, 2**32),
)
def test_every_class_gives_its_share_and_keeps_one(labels: list[str], fraction: float, seed: int) -> None:
    picked = held_out(labels, fraction, seed)
    for name, count in Counter(labels).items():
        out = sum(p for p, label in zip(picked, labels, strict=True) if label == name)
        assert out <= count - 1
        if fraction == 0:
            assert out == 0
        elif count > 1:
            assert out >= 1
            assert abs(out - fraction * count) <= 1
    assert (picked == held_out(labels, fraction, seed)).all()


def test_standardization_is_of_the_training_part_and_survives_constants() -> None:
    rows = [
        torch.tensor([[1.0, 5.0, 1e6, 1e-9], [3.0, 5.0, 1e6 + 0.0625, 3e-9]]),
        torch.tensor([[2.0, 5.0, 1e6, 2e-9]]),
    ]
    far = Part([torch.full((4, 4), 1e30)], torch.tensor([0]))
    data = Dataset("x", "", ("a", "b"), tuple("pqrs"), Part(rows, torch.tensor([0, 1])), far, far)
    mean, std = data.standardization()
    assert mean.dtype == std.dtype == torch.float32
    torch.testing.assert_close(mean, torch.tensor([2.0, 5.0, 1e6, 2e-9]))
    torch.testing.assert_close(std, torch.tensor([(2 / 3) ** 0.5, 1.0, 1.0, (2 / 3) ** 0.5 * 1e-9]))


def test_batches_are_padded_with_zeros() -> None:
    part = Part([torch.full((n, 2), float(n)) for n in (1, 3, 2)], torch.tensor([4, 5, 6]))
    x, lengths, labels = part.batch(torch.tensor([2, 0]))
    assert x.tolist() == [[[2, 2], [2, 2]], [[1, 1], [0, 0]]]
    assert lengths.tolist() == [2, 1]
    assert labels.tolist() == [6, 4]


def test_japanese_vowels_as_published() -> None:
    data = sources.japanese_vowels(validation=0.1, seed=0)
    train = [*data.train.sequences, *data.validation.sequences]
    assert (len(train), len(data.validation), len(data.test)) == (270, 27, 370)
    assert data.class_labels == tuple("123456789")
    assert data.feature_names[0] == "lpc_cepstrum_1"
    assert data.feature_names[-1] == "lpc_cepstrum_12"
    assert {x.shape[1] for x in train} == {12}
    assert (min(map(len, train)), max(map(len, train))) == (7, 26)
    assert Counter(data.validation.labels.tolist()) == dict.fromkeys(range(9), 3)
    assert Counter(data.test.labels.tolist()) == dict(enumerate([31, 35, 88, 44, 29, 24, 40, 50, 29]))
    assert "aeon" not in sys.modules


def test_japanese_vowels_without_aeon_says_how(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "aeon", None)
    with pytest.raises(sources.DataMissingError, match=r"pip install --no-deps aeon==1\.6\.0"):
        sources.japanese_vowels(validation=0.1, seed=0)


def test_recall_tells_the_class_in_the_first_step_and_nowhere_else() -> None:
    data = sources.recall(lag=6, seed=1)
    assert data.longest_sequence == 7
    assert data.parameters == {"lag": 6}
    for part in (data.train, data.validation, data.test):
        values = torch.stack(part.sequences)
        assert values.shape[1:] == (7, 8)
        assert torch.equal(values[:, 0], torch.eye(8)[part.labels])
        assert 0.75 < float(values[:, 1:].std()) < 0.85
        assert len(set(torch.bincount(part.labels).tolist())) == 1
    again, other = sources.recall(lag=6, seed=1), sources.recall(lag=6, seed=2)
    assert again.sha256 == data.sha256 != other.sha256
    assert all(map(torch.equal, again.train.sequences, data.train.sequences))
