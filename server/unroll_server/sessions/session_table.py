"""The SQLite table of sessions, in the memory of a process or in a file that workers share."""

import logging
import math
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from unroll_engine.models.spec import ModelKey
from unroll_proto.v1.session_pb2 import Session
from unroll_server.errors import SessionRoomError, SessionStoreError
from unroll_server.sessions.store import Kept, Listed, expired, lifetime, new_revision, parse, pushed_out

_log = logging.getLogger(__name__)

LOCK_TIMEOUT = 2.0
"""Seconds to wait for the locks of other workers, each of which holds one for well under a millisecond."""
RESERVE = 2**23
"""Bytes that sessions leave free on the file's disk, or half of the free space. Each change is first appended to
SQLite's log, even the removal of a session, so a full disk would stay full."""
LOG_PAGES = 128
"""Pages of SQLite's log after which its contents move to the file."""
SWEEP = 8
"""Most expired sessions removed by a transaction, so that none takes long."""
DEEP_SWEEP = 100 * SWEEP
"""Most expired sessions removed when room or an exact count is needed."""

# `gone` is a ring: rows are numbered in order, and the oldest are removed.
_SCHEMA = """
CREATE TABLE IF NOT EXISTS sessions (
    owner TEXT NOT NULL, id TEXT NOT NULL, revision BLOB NOT NULL, model TEXT NOT NULL, version INTEGER NOT NULL,
    bundle BLOB NOT NULL, step INTEGER NOT NULL, ended INTEGER NOT NULL, bound BLOB, expires REAL NOT NULL,
    used INTEGER NOT NULL, record BLOB NOT NULL,
    UNIQUE (owner, id));
CREATE INDEX IF NOT EXISTS sessions_expires ON sessions (expires);
CREATE INDEX IF NOT EXISTS sessions_used ON sessions (ended DESC, used);
CREATE INDEX IF NOT EXISTS sessions_model ON sessions (model, version, bundle, ended, expires);
CREATE INDEX IF NOT EXISTS sessions_bound ON sessions (bound) WHERE bound IS NOT NULL;
CREATE TABLE IF NOT EXISTS gone (
    number INTEGER PRIMARY KEY, owner TEXT NOT NULL, id TEXT NOT NULL, pushed_out INTEGER NOT NULL,
    until REAL NOT NULL, UNIQUE (owner, id));
CREATE TABLE IF NOT EXISTS total (sessions INTEGER NOT NULL);
INSERT INTO total SELECT 0 WHERE NOT EXISTS (SELECT * FROM total);
CREATE TRIGGER IF NOT EXISTS counted AFTER INSERT ON sessions BEGIN UPDATE total SET sessions = sessions + 1; END;
CREATE TRIGGER IF NOT EXISTS uncounted AFTER DELETE ON sessions BEGIN UPDATE total SET sessions = sessions - 1; END;
"""
_COLUMNS = "owner, id, revision, model, version, bundle, step, ended, bound, expires, used, record"
_NAMES = _COLUMNS.split(", ")
_WRITE = (
    f"INSERT INTO sessions ({_COLUMNS}) VALUES ({', '.join('?' * len(_NAMES))}) "  # noqa: S608
    f"ON CONFLICT (owner, id) DO UPDATE SET {', '.join(f'{name} = excluded.{name}' for name in _NAMES)}"
)


class SessionTable:
    """Sessions by owner and id. The methods of store.Store do the same, synchronously, each in one transaction.

    Args:
        path: File of the database, which several processes can open; None for the memory of this one.
        ttl: Seconds until an unused session expires; for as long again its expiry is remembered.
        max_sessions: Most sessions, ended ones included; the least recently used makes room.
        on_evicted: Called when a session made room for another.
        clock: Seconds of a clock that never steps and that every process with the database shares.
    """

    def __init__(
        self,
        path: Path | None,
        ttl: float,
        max_sessions: int,
        on_evicted: Callable[[], None],
        clock: Callable[[], float],
    ) -> None:
        self._ttl = ttl
        self._max = max_sessions
        self._on_evicted = on_evicted
        self._clock = clock
        self._used = 0
        # isolation_level None: transactions begin explicitly.
        self._db = sqlite3.connect(
            path or ":memory:", timeout=LOCK_TIMEOUT, isolation_level=None, check_same_thread=False
        )
        for pragma in ("journal_mode = WAL", "synchronous = OFF", "temp_store = MEMORY"):
            self._db.execute(f"PRAGMA {pragma}")
        self._db.execute(f"PRAGMA wal_autocheckpoint = {LOG_PAGES}")
        self._db.executescript(f"BEGIN IMMEDIATE; {_SCHEMA} COMMIT;")
        if path:
            free = shutil.disk_usage(path.parent).free
            used, size = (self._db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "page_size"))
            self._db.execute(f"PRAGMA max_page_count = {used + (free - min(RESERVE, free // 2)) // size}")

    def close(self) -> None:
        """Closes the database."""
        self._db.close()

    def get(self, owner: str, session_id: str) -> Kept | None:
        """See store.Store."""
        with self.transaction() as now:
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

    def put(self, session: Session, before: bytes | None) -> bool:
        """See store.Store."""
        with self.transaction() as now:
            row = self._live(session.owner, session.session_id, now)
            if (row[1] if row else None) != before:
                return False
            self.write(session, now + lifetime(session, self._ttl))
            (total,) = self._db.execute("SELECT sessions FROM total").fetchone()
            if total > self._max:
                query = "SELECT owner, id, ended FROM sessions ORDER BY ended DESC, used LIMIT ?"
                for owner, session_id, ended in self._db.execute(query, (total - self._max,)).fetchall():
                    self._drop(owner, session_id, None if ended else True, now)
                    if not ended:
                        self._on_evicted()
            return True

    def remove(self, owner: str, session_id: str) -> bool:
        """See store.Store."""
        with self.transaction() as now:
            row = self._live(owner, session_id, now)
            self._drop(owner, session_id, None, now)
        return row is not None and not row[2]

    def remove_bound(self, bound: bytes) -> int:
        """See store.Store."""
        with self.transaction():
            chosen = "SELECT rowid FROM sessions WHERE bound = ? LIMIT ?"
            query = f"DELETE FROM sessions WHERE rowid IN ({chosen})"  # noqa: S608
            return self._db.execute(query, (bound, DEEP_SWEEP)).rowcount

    def count(self, model: ModelKey, bundle: bytes) -> int:
        """See store.Store."""
        with self.transaction(sweep=DEEP_SWEEP) as now:
            return self._count("model = ? AND version = ? AND bundle = ?", (*model, bundle), now)

    def owned(self, owner: str) -> int:
        """See store.Store."""
        with self.transaction() as now:
            return self._count("owner = ?", (owner,), now)

    def listed(self, limit: int) -> list[Listed]:
        """See store.Store."""
        with self.transaction() as now:
            query = (
                "SELECT owner, id, model, version, step, expires FROM sessions"
                " WHERE ended = 0 AND expires > ? ORDER BY used DESC LIMIT ?"
            )
            rows = self._db.execute(query, (now, limit)).fetchall()
        return [
            Listed(owner, session_id, ModelKey(model, version), step, expires - now)
            for owner, session_id, model, version, step, expires in rows
        ]

    def make_room(self) -> bool:
        """Removes expired sessions and forgets old ones; returns False if there were none."""
        with self.transaction(sweep=0) as now:
            before = self._db.total_changes
            for table, column, limit in (("sessions", "expires", now), ("gone", "number", math.inf)):
                oldest = f"SELECT rowid FROM {table} WHERE {column} <= ? ORDER BY {column} LIMIT ?"  # noqa: S608
                self._db.execute(f"DELETE FROM {table} WHERE rowid IN ({oldest})", (limit, DEEP_SWEEP))  # noqa: S608
            return self._db.total_changes > before

    @contextmanager
    def transaction(self, sweep: int = SWEEP) -> Iterator[float]:
        """Runs the context as one transaction, which also removes some expired sessions; yields the time."""
        try:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                now = self._clock()
                self._sweep(now, sweep)
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

    def rows(self) -> Iterator[tuple[float, bytes]]:
        """Yields the expiry and the record of each live session that is not bound, the least recently used first."""
        query = "SELECT expires, record FROM sessions WHERE expires > ? AND bound IS NULL ORDER BY used"
        yield from self._db.execute(query, (self._clock(),))

    def gone(self) -> Iterator[tuple[float, str, str, bool]]:
        """Yields each remembered session: the time until which it is remembered, owner, id, True if pushed out."""
        query = "SELECT until, owner, id, pushed_out FROM gone WHERE until > ? ORDER BY number"
        for until, owner, session_id, out in self._db.execute(query, (self._clock(),)):
            yield until, owner, session_id, bool(out)

    def write(self, session: Session, expires: float) -> None:
        """Inserts or replaces a session, as the most recently used; within a transaction."""
        owner, session_id, snapshot = session.owner, session.session_id, session.snapshot
        content = (
            snapshot.model,
            snapshot.version,
            snapshot.bundle,
            snapshot.step,
            session.ended,
            session.bound or None,
        )
        record = session.SerializeToString()
        self._db.execute(_WRITE, (owner, session_id, new_revision(), *content, expires, self._now_used(), record))
        self._db.execute("DELETE FROM gone WHERE owner = ? AND id = ?", (owner, session_id))

    def remember(self, owner: str, session_id: str, out: bool, until: float) -> None:
        """Remembers a session that was pushed out or else expired; within a transaction."""
        row = (owner, session_id, out, until)
        self._db.execute("INSERT OR REPLACE INTO gone (owner, id, pushed_out, until) VALUES (?, ?, ?, ?)", row)
        self._db.execute("DELETE FROM gone WHERE number <= (SELECT max(number) FROM gone) - ?", (self._max,))

    def _sweep(self, now: float, most: int) -> None:
        query = "SELECT owner, id, ended FROM sessions WHERE expires <= ? ORDER BY expires LIMIT ?"
        for owner, session_id, ended in self._db.execute(query, (now, most)).fetchall():
            self._drop(owner, session_id, None if ended else False, now)
        # They are forgotten in order, except those of a file that was saved with another TTL.
        oldest = "SELECT number FROM gone ORDER BY number LIMIT ?"
        self._db.execute(f"DELETE FROM gone WHERE number IN ({oldest}) AND until <= ?", (most, now))  # noqa: S608

    def _drop(self, owner: str, session_id: str, out: bool | None, now: float) -> None:
        """Deletes a session, and remembers that it was pushed out or expired, unless `out` is None."""
        self._db.execute("DELETE FROM sessions WHERE owner = ? AND id = ?", (owner, session_id))
        if out is not None:
            self.remember(owner, session_id, out, now + self._ttl)

    def _now_used(self) -> int:
        # Unique in this process, so that the order of use is total.
        self._used = max(self._used + 1, int(self._clock() * 1e9))
        return self._used

    def _live(self, owner: str, session_id: str, now: float) -> tuple[bytes, bytes, bool] | None:
        """Returns record, revision and True if ended of a session; None if there is none, or it has just expired."""
        query = "SELECT record, revision, expires, ended FROM sessions WHERE owner = ? AND id = ?"
        row = self._db.execute(query, (owner, session_id)).fetchone()
        if row is None:
            return None
        record, revision, expires, ended = row
        if expires > now:
            return record, revision, bool(ended)
        self._drop(owner, session_id, None if ended else False, now)
        return None

    def _count(self, condition: str, values: tuple[object, ...], now: float) -> int:
        query = f"SELECT count(*) FROM sessions WHERE {condition} AND NOT ended AND expires > ?"  # noqa: S608
        (count,) = self._db.execute(query, (*values, now)).fetchone()
        return int(count)
