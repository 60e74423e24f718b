"""Snapshot: a plain value, written completely or not at all."""

import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from unroll_client import Snapshot
from unroll_proto.v1 import unroll_pb2 as pb


@st.composite
def snapshots(draw: st.DrawFn) -> Snapshot:
    layers, hidden = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    number = st.floats(width=32, allow_nan=False)
    count = layers * hidden
    tensors = draw(st.lists(st.lists(number, min_size=count, max_size=count), min_size=1, max_size=2))
    data = tuple(np.array(tensor, "<f4").tobytes() for tensor in tensors)
    return Snapshot("jv", draw(st.integers(1, 2**32 - 1)), "simple_rnn", draw(st.integers(0, 2**62)), data, layers)


@given(snapshots())
def test_bytes_there_and_back(snapshot: Snapshot) -> None:
    again = Snapshot.from_bytes(snapshot.to_bytes())
    assert again == snapshot
    assert hash(again) == hash(snapshot)
    assert again.to_bytes() == snapshot.to_bytes()
    assert pickle.loads(pickle.dumps(snapshot)) == snapshot  # noqa: S301 (our own bytes)
    for mine, theirs in zip(snapshot.state, again.state, strict=True):
        assert mine.shape[0] == snapshot.num_layers
        assert mine.ravel().tobytes() == theirs.ravel().tobytes()


def test_state_is_read_only_and_equality_goes_by_bits() -> None:
    snapshot = Snapshot("jv", 1, "simple_rnn", 5, (np.array([0.0, 1.0], "<f4").tobytes(),), 1)
    assert snapshot.state[0].tolist() == [[0, 1]]
    with pytest.raises(ValueError, match="read-only"):
        snapshot.state[0][0, 0] = 1
    assert snapshot != Snapshot("jv", 1, "simple_rnn", 5, (np.array([-0.0, 1.0], "<f4").tobytes(),), 1)
    assert snapshot != Snapshot("jv", 1, "simple_rnn", 6, snapshot.data, 1)


def test_file_there_and_back(tmp_path: Path) -> None:
    snapshot = Snapshot("jv", 1, "simple_rnn", 5, (b"\0\0\0\0",), 1)
    snapshot.save(tmp_path / "state.bin")
    snapshot.save(str(tmp_path / "state.bin"))
    assert Snapshot.load(tmp_path / "state.bin") == snapshot
    assert [path.name for path in tmp_path.iterdir()] == ["state.bin"]


def test_a_failed_save_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder"):
        Snapshot("jv", 1, "simple_rnn", 5, (b"\0\0\0\0",)).save(tmp_path / "folder")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff\xff",
        b"not a snapshot",
        pb.Snapshot(format=2, model="jv", state=[b"\0\0\0\0"]).SerializeToString(),
        pb.Snapshot(format=1, model="jv", state=[b"\0\0\0"]).SerializeToString(),
        pb.Snapshot(format=1, model="jv").SerializeToString(),
    ],
)
def test_what_is_no_snapshot(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(ValueError, match=r"^no snapshot"):
        Snapshot.from_bytes(data)
    (tmp_path / "state.bin").write_bytes(data)
    with pytest.raises(ValueError, match=r"state\.bin: no snapshot"):
        Snapshot.load(tmp_path / "state.bin")
