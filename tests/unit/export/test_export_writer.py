"""Writing of bundles: completely or not at all, never over another, and despite leftovers."""

import os
from pathlib import Path

import pytest

from unroll_export.bundle_writer import PREFIX, Draft, VersionTaken
from unroll_proto.bundle import BundleError


def listing(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_publishes_what_was_written(tmp_path: Path) -> None:
    out = tmp_path / "models" / "jv"
    with Draft(out) as draft:
        draft.write("a", b"one")
        draft.write("a", b"two")
        assert listing(out) == {draft.path.name}
        assert draft.path.name.startswith(PREFIX)
        assert draft.publish(draft.next_version()) == out / "1"
    assert listing(out) == {"1"}
    assert (out / "1" / "a").read_bytes() == b"two"


def test_others_may_read_what_the_umask_lets_them(tmp_path: Path) -> None:
    with Draft(tmp_path / "jv") as draft:
        draft.write("a", b"one")
        path = draft.publish(1)
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o777 & ~umask
    assert (path / "a").stat().st_mode & 0o777 == 0o666 & ~umask


@pytest.mark.parametrize(
    ("names", "version"), [((), 1), (("1",), 2), (("2", "10", "9"), 11), (("x", ".tmp-1", "v3", "٣", "1.5"), 1)]
)
def test_the_next_version_is_one_above_the_highest(tmp_path: Path, names: tuple[str, ...], version: int) -> None:
    for name in names:
        (tmp_path / name).mkdir()
    with Draft(tmp_path) as draft:
        assert draft.next_version() == version


def test_the_last_version_has_no_next_one(tmp_path: Path) -> None:
    (tmp_path / str(2**32 - 1)).mkdir()
    with Draft(tmp_path) as draft, pytest.raises(BundleError, match="has no next one"):
        draft.next_version()


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_what_has_the_name_is_never_replaced(tmp_path: Path, kind: str) -> None:
    with Draft(tmp_path) as draft:
        draft.write("a", b"mine")
        taken = tmp_path / "1"
        if kind == "folder":
            taken.mkdir()
            (taken / "a").write_bytes(b"theirs")
        elif kind == "file":
            taken.write_bytes(b"theirs")
        else:
            taken.symlink_to("elsewhere")
        with pytest.raises(VersionTaken):
            draft.publish(1)
        assert draft.publish(2) == tmp_path / "2"
    assert (tmp_path / "2" / "a").read_bytes() == b"mine"
    if kind == "link":
        assert taken.readlink() == Path("elsewhere")
    else:
        assert (taken / "a" if kind == "folder" else taken).read_bytes() == b"theirs"


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> None:
        with Draft(tmp_path / "models" / "jv") as draft:
            draft.write("a", b"half")
            raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        fail()
    assert listing(tmp_path) == set()


def test_a_failure_leaves_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "jv" / "1").mkdir(parents=True)
    with Draft(tmp_path / "jv"):
        pass
    assert listing(tmp_path / "jv") == {"1"}


def test_two_writers_leave_each_other_alone(tmp_path: Path) -> None:
    out = tmp_path / "models" / "jv"
    with Draft(out) as first:
        first.write("a", b"first")
        with Draft(out) as second:
            second.write("a", b"second")
            assert first.path != second.path
            assert first.path.is_dir()
            assert second.publish(second.next_version()) == out / "1"
        assert first.publish(first.next_version()) == out / "2"
    assert [(out / version / "a").read_bytes() for version in ("1", "2")] == [b"second", b"first"]


def test_folders_that_nobody_writes_to_are_removed(tmp_path: Path) -> None:
    (tmp_path / f"{PREFIX}dead").mkdir()
    (tmp_path / f"{PREFIX}dead" / "manifest.json").write_bytes(b"half")
    (tmp_path / "kept").mkdir()
    (tmp_path / f"{PREFIX}link").symlink_to(tmp_path / "kept")
    (tmp_path / f"{PREFIX}file").write_bytes(b"")
    with Draft(tmp_path) as draft:
        assert listing(tmp_path) == {"kept", f"{PREFIX}link", f"{PREFIX}file", draft.path.name}


def test_a_folder_that_cannot_be_written_to_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for out in (tmp_path / "file", tmp_path / "file" / "jv"):
        with pytest.raises(OSError, match=r"file"), Draft(out):
            pass
    assert listing(tmp_path) == {"file"}
