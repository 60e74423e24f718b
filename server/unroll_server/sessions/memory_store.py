"""Sessions in memory: of this process, or in a file in memory that all workers share."""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ParamSpec, TypeVar

from unroll_engine.models.spec import ModelKey
from unroll_proto.v1.session_pb2 import Session
from unroll_server.errors import SessionRoomError
from unroll_server.sessions.session_table import SessionTable
from unroll_server.sessions.store import Kept, Listed

P = ParamSpec("P")
T = TypeVar("T")


class MemoryStore:
    """A store.Store over a SessionTable.

    Args:
        ttl: Seconds until an unused session expires; for as long again its expiry is remembered.
        max_sessions: Most sessions, ended ones included; the least recently used makes room.
        path: File of the table, for several processes on one machine; None for the memory of this process.
        count: Called with "evicted" when a session made room for another.
        clock: Seconds of a clock that never steps and that every process with the file shares.
    """

    def __init__(
        self,
        ttl: float,
        max_sessions: int,
        path: Path | None = None,
        count: Callable[[str], None] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._table = SessionTable(path, ttl, max_sessions, lambda: count("evicted"), clock)
        # Other workers can delay a transaction on a file, so it runs on a thread.
        self._thread = ThreadPoolExecutor(1, "sessions") if path else None

    async def get(self, owner: str, session_id: str) -> Kept | None:
        """See store.Store."""
        return await self._run(self._table.get, owner, session_id)

    async def put(self, session: Session, before: bytes | None) -> bool:
        """See store.Store."""
        return await self._run(self._table.put, session, before)

    async def remove(self, owner: str, session_id: str) -> bool:
        """See store.Store."""
        return await self._run(self._table.remove, owner, session_id)

    async def remove_bound(self, bound: bytes) -> int:
        """See store.Store."""
        return await self._run(self._table.remove_bound, bound)

    async def count(self, model: ModelKey, bundle: bytes) -> int:
        """See store.Store."""
        return await self._run(self._table.count, model, bundle)

    async def owned(self, owner: str) -> int:
        """See store.Store."""
        return await self._run(self._table.owned, owner)

    async def listed(self, limit: int) -> list[Listed]:
        """See store.Store."""
        return await self._run(self._table.listed, limit)

    def confirm_takeover(self) -> None:
        """See store.Store; there is no file."""

    async def close(self) -> None:
        """See store.Store."""
        if self._thread:
            await asyncio.to_thread(self._thread.shutdown)
        self._table.close()

    async def _run(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        if self._thread is None:
            return call(*args, **kwargs)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, lambda: self._with_room(call, *args, **kwargs))

    def _with_room(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return call(*args, **kwargs)
        except SessionRoomError:
            if not self._table.make_room():
                raise
            return call(*args, **kwargs)
