"""Writes a bundle into a folder beside the versions, which becomes the next version completely or not at all."""

import errno
import fcntl
import os
import secrets
import shutil
from enum import Enum, auto
from pathlib import Path
from types import TracebackType
from typing import Self

from unroll_proto.bundle import MAX_VERSION, BundleError

PREFIX = ".tmp-"
"""Prefix of a folder that is being written; no version has it."""

_TAKEN = {errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR}


class VersionTaken(Exception):  # noqa: N818  # no error: another writer was faster
    """The version exists already."""


class Draft:
    """A bundle that is written into the model folder `out`; a context manager.

    The writer locks its folder; the lock ends with the process. The next writer removes unlocked folders; until then
    they harm nothing.

    Args:
        out: The model folder; created with its parents if missing.

    Raises:
        OSError: `out` can't be written to.
    """

    def __init__(self, out: Path) -> None:
        self._out = out
        self._made: list[Path] = []
        self._lock = -1
        self._published = False
        self.path = out

    def __enter__(self) -> Self:
        try:
            self._make_folders()
            _remove_abandoned(self._out)
            self.path, self._lock = _make_locked(self._out)
        except OSError:
            self._remove_folders()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._published:
            shutil.rmtree(self.path, ignore_errors=True)
            self._remove_folders()
        os.close(self._lock)

    def write(self, name: str, content: bytes) -> None:
        """Writes a file of the bundle and syncs it to the disk; replaces one of that name."""
        with (self.path / name).open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())

    def next_version(self) -> int:
        """Returns the version after the highest existing one; 1 if there is none.

        Raises:
            BundleError: the highest version number is in use.
        """
        names = [path.name for path in self._out.iterdir()]
        version = max((int(name) for name in names if name.isascii() and name.isdigit()), default=0) + 1
        if version > MAX_VERSION:
            raise BundleError(f"{self._out}: version {version - 1} has no next one")
        return version

    def publish(self, version: int) -> Path:
        """Moves the bundle to its version, in one step, and returns the path.

        Raises:
            VersionTaken: the version exists already; it and the draft stay unchanged.
        """
        target = self._out / str(version)
        _sync_folder(self.path)
        try:
            # Never replaces a version: rename refuses a target that is not empty.
            self.path.rename(target)
        except OSError as error:
            if error.errno in _TAKEN:
                raise VersionTaken(str(target)) from error
            raise
        self._published = True
        for folder in (self._out, *(made.parent for made in self._made)):
            _sync_folder(folder)
        return target

    def _make_folders(self) -> None:
        missing = [folder for folder in (self._out, *self._out.parents) if not folder.exists()]
        for folder in reversed(missing):
            folder.mkdir(exist_ok=True)
            self._made.append(folder)

    def _remove_folders(self) -> None:
        for folder in reversed(self._made):
            try:
                folder.rmdir()
            except OSError:  # another writer uses it
                return


def _make_locked(out: Path) -> tuple[Path, int]:
    """Creates and locks a folder to write in; returns it and the descriptor that holds the lock."""
    while True:
        path = out / f"{PREFIX}{secrets.token_hex(8)}"
        path.mkdir(parents=True)
        try:
            descriptor = _open_folder(path)
        except FileNotFoundError:
            continue
        # Between mkdir and lock, another writer may have removed the folder as abandoned.
        if _lock(descriptor) is not Lock.TAKEN and path.is_dir():
            return path, descriptor
        os.close(descriptor)


def _remove_abandoned(out: Path) -> None:
    """Removes folders of writers that ended early."""
    for path in out.glob(f"{PREFIX}*"):
        try:
            descriptor = _open_folder(path)
        except OSError:  # removed meanwhile, another user's, or not a folder
            continue
        if _lock(descriptor) is Lock.HELD:
            shutil.rmtree(path, ignore_errors=True)
        os.close(descriptor)


class Lock(Enum):
    """Outcome of an attempt to lock a folder."""

    HELD = auto()
    TAKEN = auto()
    UNSUPPORTED = auto()
    """The file system has no locks; then no writer locks or removes folders."""


def _lock(descriptor: int) -> Lock:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return Lock.TAKEN
    except OSError:
        return Lock.UNSUPPORTED
    return Lock.HELD


def _open_folder(path: Path) -> int:
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
