"""Quotas of identities: one check and one error for all that an identity may use at once.

Calls in flight and open sequences are counted here, over all workers. Sessions are counted by their store, queued
timesteps by the engine's admission.
"""

import hashlib
import mmap
from collections.abc import Awaitable, Callable
from pathlib import Path

from unroll_engine.errors import over_quota
from unroll_server.identity.tokens import Identities

RETRY_AFTER = 1.0
"""Seconds after which a refused caller may retry."""
_CALLS, _SEQUENCES = range(2)
_KINDS = 2
_ITEM = 8


class Quotas:
    """Checks the use of each identity against its quotas. Used on one event loop.

    Every worker has a row of its own in a file of the identity, in memory that all workers map, and sums up the rows of
    all. Workers that count at the same moment can exceed a quota, by one each.

    Args:
        identities: The identities with their quotas.
        folder: Folder of the files that workers share; None for a single process.
        worker: Number of this worker, from 0.
        workers: Number of workers.
    """

    def __init__(self, identities: Identities, folder: Path | None = None, worker: int = 0, workers: int = 1) -> None:
        self._identities = identities
        self._folder = folder
        self._begin = worker * _KINDS
        self._size = workers * _KINDS
        self._counts: dict[str, memoryview] = {}
        if folder is not None:
            folder.mkdir(mode=0o700, exist_ok=True)
            # Resets the counts of a dead worker of this number.
            for file in folder.iterdir():
                row = self._map(file)[self._begin : self._begin + _KINDS]
                row[:] = memoryview(bytes(_ITEM * _KINDS)).cast("q")

    def open_call(self, identity: str) -> None:
        """Counts a call in flight, until `close_call`; the empty identity is neither counted nor refused.

        Raises:
            OverloadedError: the identity's quota is used up.
        """
        if identity:
            self._take(_CALLS, identity, self._identities.named(identity).max_concurrent_calls, "calls in flight")

    def close_call(self, identity: str) -> None:
        """Counts the end of a call."""
        if identity:
            self._counts[identity][self._begin + _CALLS] -= 1

    def open_sequence(self, identity: str) -> None:
        """Counts a sequence open on a stream, until `close_sequence`; see `open_call`.

        Raises:
            OverloadedError: the identity's quota is used up.
        """
        if identity:
            self._take(_SEQUENCES, identity, self._identities.named(identity).max_open_sequences, "open sequences")

    def close_sequence(self, identity: str) -> None:
        """Counts the end of a sequence."""
        if identity:
            self._counts[identity][self._begin + _SEQUENCES] -= 1

    async def check_sessions(self, identity: str, count: Callable[[], Awaitable[int]]) -> None:
        """Checks that the identity may have one more session. Concurrent calls can exceed the quota, by one each.

        Args:
            identity: Name of the identity; the empty one has no quota.
            count: Counts its sessions; called only if it has a quota.

        Raises:
            OverloadedError: the identity's quota is used up.
        """
        limit = self._identities.named(identity).max_sessions if identity else None
        if limit is not None:
            _check(identity, await count(), limit, "sessions")

    def queued_steps(self, identity: str) -> int | None:
        """Returns the identity's quota of queued timesteps, which the engine checks; None for no quota."""
        return self._identities.named(identity).max_queued_steps

    def _take(self, kind: int, identity: str, limit: int | None, what: str) -> None:
        counts = self._counts.get(identity) or self._counts_of(identity)
        if limit is not None:
            _check(identity, sum(counts[kind::_KINDS]), limit, what)
        counts[self._begin + kind] += 1

    def _counts_of(self, identity: str) -> memoryview:
        if self._folder is None:
            counts = memoryview(bytearray(_ITEM * self._size)).cast("q")
        else:
            # Hashed, so that any name is a valid file name.
            counts = self._map(self._folder / hashlib.sha256(identity.encode()).hexdigest())
        self._counts[identity] = counts
        return counts

    def _map(self, file: Path) -> memoryview:
        with file.open("ab") as shared:
            # Every worker sets the same size; new bytes are zero.
            shared.truncate(_ITEM * self._size)
        with file.open("r+b") as shared:
            return memoryview(mmap.mmap(shared.fileno(), 0)).cast("q")


def _check(identity: str, used: int, limit: int, what: str) -> None:
    if used >= limit:
        raise over_quota(identity, limit, what, RETRY_AFTER)
