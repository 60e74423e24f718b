"""The folder that the processes of a server share, and the end of those that killed servers left behind."""

import fcntl
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

_log = logging.getLogger(__name__)

HELD = ".unroll-server"
"""A file in each such folder. A server that lives has it locked, which the kernel ends with the server."""
_PREFIX = "unroll-"
_NAME = re.compile(_PREFIX + "[a-z0-9_]{8}")
"""As tempfile makes names."""


@contextmanager
def private_folder() -> Iterator[Path]:
    """A folder for this user alone, gone afterwards: where TMPDIR says, else in memory where that can be.

    Those of servers that had no time to remove theirs are removed as well: there can be a key in them, and as many
    sessions as memory holds.
    """
    memory = "/dev/shm"  # noqa: S108
    in_memory = "TMPDIR" not in os.environ and os.access(memory, os.W_OK)
    base = Path(memory if in_memory else tempfile.gettempdir())
    _sweep(base)
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=base))
    try:
        with (folder / f"{HELD}.new").open("wb") as held:
            # Under this name it is locked: nobody takes a folder that is being made for one that was left.
            if _lock(held):
                Path(held.name).rename(folder / HELD)
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _sweep(base: Path) -> None:
    """Removes the folders of this user's servers that do not live any more."""
    with suppress(OSError):
        for folder in base.iterdir():
            if _NAME.fullmatch(folder.name):
                # What is another user's, or gone meanwhile, is none of ours.
                with suppress(OSError):
                    _remove_if_left(folder)


def _remove_if_left(folder: Path) -> None:
    if folder.lstat().st_uid != os.geteuid():
        return
    with (folder / HELD).open("rb") as held:
        if _lock(held):
            shutil.rmtree(folder, ignore_errors=True)
            _log.debug("removed %s, which a server that was killed had left", folder)


def _lock(file: IO[bytes]) -> bool:
    """Whether the file could be locked, until it is closed; some file systems can't."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
