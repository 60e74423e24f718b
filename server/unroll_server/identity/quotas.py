"""What each identity has in use, over all workers of a supervisor, and whether it may have more."""

import hashlib
import mmap
from pathlib import Path

from unroll_engine.errors import OverloadedError
from unroll_server.identity.tokens import Identities

CALLS, OPEN_SEQUENCES = range(2)
REASON = "IDENTITY_LIMIT"
"""The reason of a refusal."""
RETRY_AFTER = 1.0
"""Seconds after which to try again."""
_LIMITS = ("max_concurrent_calls", "max_open_sequences")
_NAMES = ("calls in flight", "sequences open")
_KINDS = len(_NAMES)
_ITEM = 8


class Usage:
    """Counts on one event loop.

    Every worker has a row of its own in a file of the identity, in memory that they share, and reads those of all.
    Workers that count at the same moment can go past a limit, by one each.

    Args:
        identities: Who may have how much.
        folder: Where the workers' files are; None where there are no others.
        worker: Which of them this is.
        workers: How many there are.
    """

    def __init__(self, identities: Identities, folder: Path | None = None, worker: int = 0, workers: int = 1) -> None:
        self._identities = identities
        self._folder = folder
        self._begin = worker * _KINDS
        self._size = workers * _KINDS
        self._counts: dict[str, memoryview] = {}
        if folder is not None:
            folder.mkdir(mode=0o700, exist_ok=True)
            # What a worker had that died with this number.
            for file in folder.iterdir():
                row = self._open(file)[self._begin : self._begin + _KINDS]
                row[:] = memoryview(bytes(_ITEM * _KINDS)).cast("q")

    def take(self, kind: int, identity: str) -> None:
        """Counts one more.

        Args:
            kind: CALLS or OPEN_SEQUENCES.
            identity: Whose; nothing is counted for the empty one.

        Raises:
            OverloadedError: that would be more than the identity may have.
        """
        if not identity:
            return
        counts = self._counts.get(identity) or self._of(identity)
        limit: int | None = getattr(self._identities.named(identity), _LIMITS[kind])
        if limit is not None:
            total = sum(counts[kind::_KINDS])
            if total >= limit:
                problem = f"{identity} has {total} {_NAMES[kind]} and may have {limit}"
                raise OverloadedError(problem, RETRY_AFTER, REASON)
        counts[self._begin + kind] += 1

    def give(self, kind: int, identity: str) -> None:
        """Counts one less, that was taken."""
        if identity:
            self._counts[identity][self._begin + kind] -= 1

    def _of(self, identity: str) -> memoryview:
        if self._folder is None:
            counts = memoryview(bytearray(_ITEM * self._size)).cast("q")
        else:
            # Hashed, so that any name is a file's.
            counts = self._open(self._folder / hashlib.sha256(identity.encode()).hexdigest())
        self._counts[identity] = counts
        return counts

    def _open(self, file: Path) -> memoryview:
        with file.open("ab") as shared:
            # The same whoever comes first; what is new is zero.
            shared.truncate(_ITEM * self._size)
        with file.open("r+b") as shared:
            return memoryview(mmap.mmap(shared.fileno(), 0)).cast("q")
