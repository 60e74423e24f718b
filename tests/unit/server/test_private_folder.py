"""The folder that the processes of a server share goes with the server, at the latest when the next one starts."""

import subprocess
import sys
from pathlib import Path

import pytest

from unroll_server.workers.runtime_dir import HELD, private_folder

HOLD = """
from unroll_server.workers.runtime_dir import private_folder
with private_folder() as folder:
    (folder / "sessions").write_bytes(b"state")
    print(folder, flush=True)
    input()
"""


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    return tmp_path


def test_a_folder_is_this_users_alone_and_gone_afterwards(temporary: Path) -> None:
    with private_folder() as folder, private_folder() as other:
        assert folder.parent == other.parent == temporary
        assert folder.stat().st_mode & 0o777 == 0o700
        assert (folder / HELD).exists()
        (folder / "file").touch()
    assert not list(temporary.iterdir())


def test_what_a_killed_server_left_is_removed_and_what_another_one_has_is_not(temporary: Path) -> None:
    command = [sys.executable, "-c", HOLD]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        theirs = Path(process.stdout.readline().strip())
        with private_folder():
            assert (theirs / "sessions").exists()
        process.kill()
    assert (theirs / "sessions").exists()
    with private_folder() as ours:
        assert list(temporary.iterdir()) == [ours]


def test_what_only_looks_like_such_a_folder_is_left_alone(temporary: Path) -> None:
    for name in ("unroll-my.model", "unroll-abcdefgh", "unroll-12345678"):
        (temporary / name).mkdir()
    (temporary / "unroll-my.model" / HELD).touch()
    (temporary / "unroll-12345678" / f"{HELD}.new").touch()
    (temporary / "unroll-file_abc").touch()
    with private_folder():
        pass
    assert len(list(temporary.iterdir())) == 4
