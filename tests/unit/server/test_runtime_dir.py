"""A runtime directory ends with its server, at the latest when the next server starts."""

import subprocess
import sys
from pathlib import Path

import pytest

from unroll_server.workers.runtime_dir import LOCK, runtime_dir

HOLD = """
from unroll_server.workers.runtime_dir import runtime_dir
with runtime_dir() as made:
    (made.path / "sessions").write_bytes(b"state")
    print(made.path, flush=True)
    input()
"""


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    return tmp_path


def test_only_its_user_can_enter_it_and_it_is_removed_at_the_end(temporary: Path) -> None:
    with runtime_dir() as made, runtime_dir() as other:
        assert made.path.parent == other.path.parent == temporary
        assert made.path.stat().st_mode & 0o777 == 0o700
        assert (made.path / LOCK).exists()
        (made.path / "file").touch()
    assert not list(temporary.iterdir())


def test_that_of_a_killed_server_is_removed_and_that_of_another_server_is_kept(temporary: Path) -> None:
    command = [sys.executable, "-c", HOLD]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        theirs = Path(process.stdout.readline().strip())
        with runtime_dir():
            assert (theirs / "sessions").exists()
        process.kill()
    assert (theirs / "sessions").exists()
    with runtime_dir() as ours:
        assert list(temporary.iterdir()) == [ours.path]


def test_a_folder_that_only_looks_like_one_is_kept(temporary: Path) -> None:
    for name in ("unroll-my.model", "unroll-abcdefgh", "unroll-12345678"):
        (temporary / name).mkdir()
    (temporary / "unroll-my.model" / LOCK).touch()
    (temporary / "unroll-12345678" / f"{LOCK}.new").touch()
    (temporary / "unroll-file_abc").touch()
    with runtime_dir():
        pass
    assert len(list(temporary.iterdir())) == 4
