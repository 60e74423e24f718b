"""Folders of a repository that can't be served, or can't be read."""

import logging
import os
from pathlib import Path

import pytest
from support import bundles
from support.repositories import serving

from unroll_server.errors import ModelRefusedError


async def test_a_missing_repository_changes_nothing(root: Path) -> None:
    async with serving(root) as served:
        root.rename(root.with_name("elsewhere"))  # noqa: ASYNC240
        await served.repository.refresh()
        assert served.names == ["m/1"]
        with pytest.raises(ModelRefusedError, match="can't be read"):
            await served.repository.load("m")


async def test_an_unreadable_model_folder_changes_nothing(
    root: Path, exported: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    bundles.publish(exported[1], root, "other", 1)
    async with serving(root) as served:
        (root / "m").rename(root / ".away")
        (root / "m").symlink_to("m")  # listing it fails, even for root
        for _ in range(2):
            await served.repository.refresh()
            assert served.names == ["m/1", "other/1"]
        (error,) = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
        assert f"{str(root / 'm')!r} can't be read: " in error
        with pytest.raises(ModelRefusedError, match="can't be read"):
            await served.repository.load("m")
        (root / "m").unlink()
        (root / ".away").rename(root / "m")
        bundles.withdraw(root / "m" / "1")
        bundles.publish(exported[1], root, "m", 2)
        await served.repository.refresh()
        assert served.names == ["m/2", "other/1"]


async def test_a_broken_link_does_not_affect_other_versions(root: Path) -> None:
    async with serving(root) as served:
        (root / "m" / "2").symlink_to("a" * 300)  # longer than a name can be
        await served.repository.refresh()
        assert served.index == [("m", 1, "READY"), ("m", 2, "REFUSED")]


@pytest.mark.parametrize("folder", [b"m/4294967296", b"m/20261122235959", b"\xff\xfe/1", b"two\nlines/1", b"\x1b[2J/1"])
async def test_folders_without_a_valid_name_are_passed_over_and_logged_once(
    root: Path, exported: list[Path], folder: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(root) as served:
        made = Path(os.fsdecode(os.fsencode(root) + b"/" + folder))
        made.parent.mkdir(exist_ok=True)
        bundles.publish(exported[1], root.parent, "m", 1).rename(made)
        for _ in range(3):
            await served.repository.refresh()
        assert served.index == [("m", 1, "READY")]
        (error,) = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
        assert error.startswith(f"passed over: {str(made)!r}: the ")
        assert error.isprintable()


async def test_an_invalid_model_name_is_refused(root: Path, exported: list[Path]) -> None:
    bundles.publish(exported[1], root, "my model", 1)
    async with serving(root) as served:
        (refused,) = [entry for entry in served.repository.index() if entry.name == "my model"]
        assert "model name 'my model': 1 to 64 letters" in refused.reason


@pytest.mark.parametrize(
    "name", ["m/01", "m/0", "m/latest", "m/4294967296", ".hidden/1", "m/.tmp-1", "a\nb/1", "\udcff/1"]
)
async def test_other_folders_are_not_versions(root: Path, exported: list[Path], name: str) -> None:
    (root / name).parent.mkdir(exist_ok=True)
    async with serving(root) as served:
        bundles.publish(exported[1], root, "m", 2).rename(root / name)
        await served.repository.refresh()
        assert served.index == [("m", 1, "READY")]


async def test_links_out_of_the_repository_are_refused(root: Path, exported: list[Path]) -> None:
    outside = bundles.publish(exported[1], root.parent / "outside", "m", 2)
    (root / "m" / "2").symlink_to(outside)
    bundles.publish(exported[1], root.parent / "outside", "linked", 1)
    (root / "linked").symlink_to(root.parent / "outside" / "linked")
    inside = bundles.publish(exported[1], root, "m", 3)
    inside.rename(root / ".kept")
    (root / "m" / "3").symlink_to(root / ".kept")
    (root / "m" / "4").symlink_to(root / "m" / "4")
    async with serving(root) as served:
        assert served.names == ["m/1", "m/3"]
        reasons = {(name, version): reason for name, version, _, reason in served.repository.index() if reason}
        assert reasons.keys() == {("m", 2), ("linked", 1)}
        assert all("a link out of the repository" in reason for reason in reasons.values())
