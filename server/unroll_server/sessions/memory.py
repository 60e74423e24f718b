"""Sessions in memory: in an SQLite database of this process, or in one file that all workers share."""

import asyncio
import logging
import math
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import ParamSpec, TypeVar

from unroll_engine.models.spec import ModelKey
from unroll_proto.v1.session_pb2 import Session
from unroll_server.errors import SessionRoomError, SessionStoreError
from unroll_server.sessions.store import Kept, Listed, expired, lifetime, new_revision, parse, pushed_out

_log = logging.getLogger(__name__)

PATIENCE = 2.0
"""Seconds to wait for the other workers, each of which takes well under a millisecond."""
RESERVE = 2**23
"""Bytes that sessions leave free where their file is, or half of what is free: each change, the removal of a session
too, first goes to the end of SQLite's log, so that a full disk would stay full for ever."""
LOG_PAGES = 128
"""Pages of that log after which what it holds is moved to the file, and it begins anew."""
SWEPT = 8
"""Expired sessions that are put away with each use of the store, so that none takes long."""

# `gone` is a ring: its rows are in the order in which they came, the oldest leave.
_TABLES = """
CREATE TABLE IF NOT EXISTS sessions (
    owner TEXT NOT NULL, id TEXT NOT NULL, revision BLOB NOT NULL, model TEXT NOT NULL, version INTEGER NOT NULL,
    bundle BLOB NOT NULL, step INTEGER NOT NULL, ended INTEGER NOT NULL, expires REAL NOT NULL, used INTEGER NOT NULL,
    record BLOB NOT NULL,
    UNIQUE (owner, id));
CREATE INDEX IF NOT EXISTS sessions_expires ON sessions (expires);
CREATE INDEX IF NOT EXISTS sessions_used ON sessions (ended DESC, used);
CREATE INDEX IF NOT EXISTS sessions_model ON sessions (model, version, bundle, ended, expires);
CREATE TABLE IF NOT EXISTS gone (
    number INTEGER PRIMARY KEY, owner TEXT NOT NULL, id TEXT NOT NULL, pushed_out INTEGER NOT NULL,
    until REAL NOT NULL, UNIQUE (owner, id));
CREATE TABLE IF NOT EXISTS total (sessions INTEGER NOT NULL);
INSERT INTO total SELECT 0 WHERE NOT EXISTS (SELECT * FROM total);
CREATE TRIGGER IF NOT EXISTS counted AFTER INSERT ON sessions BEGIN UPDATE total SET sessions = sessions + 1; END;
CREATE TRIGGER IF NOT EXISTS uncounted AFTER DELETE ON sessions BEGIN UPDATE total SET sessions = sessions - 1; END;
"""

P = ParamSpec("P")
T = TypeVar("T")


class MemoryStore:
    """See store.Store.

    Args:
        ttl: Seconds that a session may rest; for as long again the store remembers that it expired.
        max_sessions: Most sessions, ended ones included; the longest unused makes room.
        path: File of the database, for several processes on one machine; None: in this process alone.
        count: Called with "evicted" when a session has made room.
        clock: Seconds of a clock that never steps and that every process with the database shares.
    """

    def __init__(
        self,
        ttl: float,
        max_sessions: int,
        path: Path | None = None,
        count: Callable[[str], None] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._ttl = ttl
        self._max = max_sessions
        self._count_event = count
        self._clock = clock
        self._used = 0
        # isolation_level None: transactions begin explicitly. With a file they run on a thread, since other workers can
        # delay them.
        self._thread = ThreadPoolExecutor(1, "sessions") if path else None
        self._db = sqlite3.connect(path or ":memory:", timeout=PATIENCE, isolation_level=None, check_same_thread=False)
        for pragma in ("journal_mode = WAL", "synchronous = OFF", "temp_store = MEMORY"):
            self._db.execute(f"PRAGMA {pragma}")
        self._db.execute(f"PRAGMA wal_autocheckpoint = {LOG_PAGES}")
        self._db.executescript(f"BEGIN IMMEDIATE; {_TABLES} COMMIT;")
        if path:
            self._leave_reserve(path)

    def _leave_reserve(self, path: Path) -> None:
        free = shutil.disk_usage(path.parent).free
        ((used,), (size,)) = (self._db.execute(f"PRAGMA {name}").fetchone() for name in ("page_count", "page_size"))
        self._db.execute(f"PRAGMA max_page_count = {used + (free - min(RESERVE, free // 2)) // size}")

    async def get(self, owner: str, session_id: str) -> Kept | None:
        """See store.Store."""
        return await self._do(self._get, owner, session_id)

    async def put(self, session: Session, before: bytes | None) -> bool:
        """See store.Store."""
        return await self._do(self._put, session, before)

    async def remove(self, owner: str, session_id: str) -> bool:
        """See store.Store."""
        return await self._do(self._remove, owner, session_id)

    async def count(self, model: ModelKey, bundle: bytes) -> int:
        """See store.Store."""
        return await self._do(self._count, model, bundle)

    async def owned(self, owner: str) -> int:
        """See store.Store."""
        return await self._do(self._owned, owner)

    async def listed(self, limit: int) -> list[Listed]:
        """See store.Store."""
        return await self._do(self._listed, limit)

    def keep(self) -> None:
        """See store.Store; there is nothing to do."""

    async def close(self) -> None:
        """See store.Store."""
        if self._thread:
            await asyncio.to_thread(self._thread.shutdown)
        self._db.close()

    # For files of sessions.

    def rows(self) -> Iterator[tuple[float, bytes]]:
        """Yields when each live session expires and its bytes, in the order of last use."""
        query = "SELECT expires, record FROM sessions WHERE expires > ? ORDER BY used"
        yield from self._db.execute(query, (self._clock(),))

    def gone(self) -> Iterator[tuple[float, str, str, bool]]:
        """Yields each session that is remembered as gone: until when, owner, id, and whether it was pushed out."""
        query = "SELECT until, owner, id, pushed_out FROM gone WHERE until > ? ORDER BY number"
        for until, owner, session_id, out in self._db.execute(query, (self._clock(),)):
            yield until, owner, session_id, bool(out)

    @contextmanager
    def filling(self) -> Iterator[None]:
        """Makes the calls of `add` and `add_gone` within it one transaction."""
        with self._transaction():
            yield

    def add(self, session: Session, expires: float) -> None:
        """Takes over a session from an earlier process, as the one used last."""
        self._write(session, expires, self._now_used())

    def add_gone(self, owner: str, session_id: str, out: bool, until: float) -> None:
        """Takes over a session that an earlier process remembered as gone."""
        self._bury(owner, session_id, out, until)

    async def _do(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        if self._thread is None:
            return call(*args, **kwargs)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, lambda: self._with_room(call, *args, **kwargs))

    def _with_room(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return call(*args, **kwargs)
        except SessionRoomError:
            # The memory of expired sessions takes room too, and is given up first.
            with self._transaction(swept=0) as now:
                many, before = 100 * SWEPT, self._db.total_changes
                for table, column, when in (("sessions", "expires", now), ("gone", "number", math.inf)):
                    oldest = f"SELECT rowid FROM {table} WHERE {column} <= ? ORDER BY {column} LIMIT ?"  # noqa: S608
                    self._db.execute(f"DELETE FROM {table} WHERE rowid IN ({oldest})", (when, many))  # noqa: S608
                forgotten = self._db.total_changes - before
            if not forgotten:
                raise
            return call(*args, **kwargs)

    @contextmanager
    def _transaction(self, swept: int = SWEPT) -> Iterator[float]:
        """Runs a transaction, and removes some expired sessions in it; yields the time."""
        try:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                now = self._clock()
                self._sweep(now, swept)
                yield now
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode == sqlite3.SQLITE_FULL:
                raise SessionRoomError("the memory for sessions is full") from error
            _log.warning("the sessions' memory does not answer: %s", error)
            raise SessionStoreError("the sessions' memory does not answer") from error

    def _sweep(self, now: float, most: int) -> None:
        query = "SELECT owner, id, ended FROM sessions WHERE expires <= ? ORDER BY expires LIMIT ?"
        for owner, session_id, ended in self._db.execute(query, (now, most)).fetchall():
            self._drop(owner, session_id, None if ended else False, now)
        # They are forgotten in the order in which they came, but for those of a file that was saved with another TTL.
        oldest = "SELECT number FROM gone ORDER BY number LIMIT ?"
        self._db.execute(f"DELETE FROM gone WHERE number IN ({oldest}) AND until <= ?", (most, now))  # noqa: S608

    def _drop(self, owner: str, session_id: str, out: bool | None, now: float) -> None:
        """Deletes a session, and remembers why, pushed out or expired, unless `out` is None."""
        self._db.execute("DELETE FROM sessions WHERE owner = ? AND id = ?", (owner, session_id))
        if out is not None:
            self._bury(owner, session_id, out, now + self._ttl)

    def _bury(self, owner: str, session_id: str, out: bool, until: float) -> None:
        row = (owner, session_id, out, until)
        self._db.execute("INSERT OR REPLACE INTO gone (owner, id, pushed_out, until) VALUES (?, ?, ?, ?)", row)
        self._db.execute("DELETE FROM gone WHERE number <= (SELECT max(number) FROM gone) - ?", (self._max,))

    def _now_used(self) -> int:
        # Never twice the same in this process, so that the order of use is total.
        self._used = max(self._used + 1, int(self._clock() * 1e9))
        return self._used

    def _live(self, owner: str, session_id: str, now: float) -> tuple[bytes, bytes, bool] | None:
        query = "SELECT record, revision, expires, ended FROM sessions WHERE owner = ? AND id = ?"
        row = self._db.execute(query, (owner, session_id)).fetchone()
        if row is None:
            return None
        record, revision, expires, ended = row
        if expires > now:
            return record, revision, bool(ended)
        self._drop(owner, session_id, None if ended else False, now)
        return None

    def _get(self, owner: str, session_id: str) -> Kept | None:
        with self._transaction() as now:
            row = self._live(owner, session_id, now)
            if row is None:
                query = "SELECT pushed_out FROM gone WHERE owner = ? AND id = ? AND until > ?"
                gone = self._db.execute(query, (owner, session_id, now)).fetchone()
            else:
                used = "UPDATE sessions SET used = ?, expires = iif(ended, expires, ?) WHERE owner = ? AND id = ?"
                self._db.execute(used, (self._now_used(), now + self._ttl, owner, session_id))
        if row is not None:
            return Kept(parse(row[0]), row[1])
        if gone is not None:
            raise pushed_out() if gone[0] else expired(self._ttl)
        return None

    def _put(self, session: Session, before: bytes | None) -> bool:
        with self._transaction() as now:
            row = self._live(session.owner, session.session_id, now)
            if (row[1] if row else None) != before:
                return False
            self._write(session, now + lifetime(session, self._ttl), self._now_used())
            (total,) = self._db.execute("SELECT sessions FROM total").fetchone()
            if total > self._max:
                query = "SELECT owner, id, ended FROM sessions ORDER BY ended DESC, used LIMIT ?"
                for owner, session_id, ended in self._db.execute(query, (total - self._max,)).fetchall():
                    self._drop(owner, session_id, None if ended else True, now)
                    if not ended:
                        self._count_event("evicted")
            return True

    def _write(self, session: Session, expires: float, used: int) -> None:
        snapshot = session.snapshot
        self._db.execute(
            "INSERT INTO sessions (owner, id, revision, model, version, bundle, step, ended, expires, used, record)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (owner, id) DO UPDATE SET"
            " revision = excluded.revision, model = excluded.model, version = excluded.version,"
            " bundle = excluded.bundle, step = excluded.step, ended = excluded.ended, expires = excluded.expires,"
            " used = excluded.used, record = excluded.record",
            (
                session.owner,
                session.session_id,
                new_revision(),
                snapshot.model,
                snapshot.version,
                snapshot.bundle,
                snapshot.step,
                session.ended,
                expires,
                used,
                session.SerializeToString(),
            ),
        )
        self._db.execute("DELETE FROM gone WHERE owner = ? AND id = ?", (session.owner, session.session_id))

    def _remove(self, owner: str, session_id: str) -> bool:
        with self._transaction() as now:
            row = self._live(owner, session_id, now)
            self._drop(owner, session_id, None, now)
        return row is not None and not row[2]

    def _count(self, model: ModelKey, bundle: bytes) -> int:
        with self._transaction() as now:
            self._sweep(now, 100 * SWEPT)
            query = (
                "SELECT count(*) FROM sessions"
                " WHERE model = ? AND version = ? AND bundle = ? AND NOT ended AND expires > ?"
            )
            (count,) = self._db.execute(query, (*model, bundle, now)).fetchone()
        return int(count)

    def _owned(self, owner: str) -> int:
        with self._transaction() as now:
            query = "SELECT count(*) FROM sessions WHERE owner = ? AND NOT ended AND expires > ?"
            (count,) = self._db.execute(query, (owner, now)).fetchone()
        return int(count)

    def _listed(self, limit: int) -> list[Listed]:
        with self._transaction() as now:
            query = (
                "SELECT owner, id, model, version, step, expires FROM sessions"
                " WHERE ended = 0 AND expires > ? ORDER BY used DESC LIMIT ?"
            )
            rows = self._db.execute(query, (now, limit)).fetchall()
        return [
            Listed(owner, session_id, ModelKey(model, version), step, expires - now)
            for owner, session_id, model, version, step, expires in rows
        ]
