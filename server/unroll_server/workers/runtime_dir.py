"""The private folder that a supervisor shares with its workers; also removes those of killed servers."""

import fcntl
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

_log = logging.getLogger(__name__)

LOCK = ".unroll-server"
"""File in each runtime directory that its server keeps locked. The kernel releases the lock when the server ends."""
_PREFIX = "unroll-"
_NAME = re.compile(_PREFIX + "[a-z0-9_]{8}")
"""Pattern of names that tempfile makes."""


@dataclass(frozen=True, slots=True)
class RuntimeDir:
    """Files of the processes of a server, in a folder that only their user can enter.

    Attributes:
        path: Path of the folder.
    """

    path: Path

    @property
    def settings(self) -> Path:
        """File of the workers' settings."""
        return self.path / "settings.json"

    @property
    def metrics(self) -> Path:
        """Folder of the metrics of all workers, which the supervisor and workers (ModelStatistics) sum up."""
        return self.path / "metrics"

    @property
    def quotas(self) -> Path:
        """Folder of the workers' counts for quotas of identities."""
        return self.path / "quotas"

    def admin_socket(self, worker: int) -> Path:
        """Returns the path of a worker's private admin listener."""
        return self.path / f"{worker}.sock"

    def remove(self) -> None:
        """Removes the folder, as far as that is possible."""
        shutil.rmtree(self.path, ignore_errors=True)


@contextmanager
def runtime_dir() -> Iterator[RuntimeDir]:
    """Makes a runtime directory, and removes it at the end of the block.

    It is in $TMPDIR if that is set, else in memory if possible. Runtime directories of killed servers are removed too,
    since they can hold a password, and sessions that fill the memory.
    """
    memory = "/dev/shm"  # noqa: S108
    in_memory = "TMPDIR" not in os.environ and os.access(memory, os.W_OK)
    base = Path(memory if in_memory else tempfile.gettempdir())
    _sweep(base)
    made = RuntimeDir(Path(tempfile.mkdtemp(prefix=_PREFIX, dir=base)))
    try:
        with (made.path / f"{LOCK}.new").open("wb") as lock:
            # Renamed once it is locked, so that no other server removes it as abandoned.
            if _lock(lock):
                Path(lock.name).rename(made.path / LOCK)
            yield made
    finally:
        made.remove()


def _sweep(base: Path) -> None:
    """Removes the runtime directories of this user's servers that have ended."""
    with suppress(OSError):
        for folder in base.iterdir():
            if _NAME.fullmatch(folder.name):
                # It is another user's, or was removed meanwhile.
                with suppress(OSError):
                    _remove_if_abandoned(folder)


def _remove_if_abandoned(folder: Path) -> None:
    if folder.lstat().st_uid != os.geteuid():
        return
    with (folder / LOCK).open("rb") as lock:
        if _lock(lock):
            RuntimeDir(folder).remove()
            _log.debug("removed %s of a server that was killed", folder)


def _lock(file: IO[bytes]) -> bool:
    """Locks a file until it is closed; returns False if it is locked already, or the file system has no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
