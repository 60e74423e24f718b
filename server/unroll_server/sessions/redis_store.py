"""Sessions in Redis, shared by all replicas.

A session is a hash under `unroll:session:HASH`, the hash of owner and id, with Redis's own expiry. The key
`unroll:session:HASH:was` outlives it, to tell an expired session from one that never was. Sorted sets list all
sessions, those of a model version, of an owner and of a connection by their expiry; the hash names the session's sets.
Each use is one script, so it is atomic and can be retried: a write that was done already is recognized by its revision.

In a cluster a script reaches the keys of one slot. So sessions are spread over `BUCKETS`, each with a slot and sets of
its own, and what is known of all sessions is asked of every bucket.
"""

import asyncio
import hashlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

from redis.asyncio import RedisCluster
from redis.exceptions import OutOfMemoryError, RedisError

from unroll_engine.models.spec import ModelKey
from unroll_proto.v1.session_pb2 import Session
from unroll_server.errors import SessionRoomError, SessionStoreError
from unroll_server.sessions.redis_client import TIMEOUT, client_of
from unroll_server.sessions.store import Kept, Listed, expired, lifetime, new_revision, parse

_log = logging.getLogger(__name__)

BUCKETS = 16
"""Buckets of sessions in a cluster: the most primaries that share the work."""
CONNECTIONS = 64
"""Most uses at a time, each of a connection; one more waits."""
MOST_ENDED = 256
"""Most sessions of a bucket that are ended at a time with their connection."""
LOG_INTERVAL = 10.0
"""Least seconds between two log lines about a Redis that does not answer."""

# Times are Redis's, in milliseconds and fractions, so that the replicas' clocks do not matter.
_TIME = """
local time = redis.call('TIME')
local now = time[1] * 1000 + time[2] / 1000
"""
# A session's sets are names separated by spaces, none once it has ended. They drop expired members, and expire with the
# last one.
_SETS = """
local function enter(sets, now, ttl, member)
    for set in string.gmatch(sets, '%S+') do
        redis.call('ZREMRANGEBYSCORE', set, '-inf', string.format('(%.3f', now))
        redis.call('ZADD', set, now + ttl, member)
        redis.call('PEXPIRE', set, ttl)
    end
end
local function leave(sets, member)
    for set in string.gmatch(sets, '%S+') do redis.call('ZREM', set, member) end
end
"""
# KEYS: session, was. ARGV: member, ttl, ttl of was. Returns {revision, record}, else 1 if the session has expired.
_GET = f"""{_TIME}{_SETS}
local kept = redis.call('HMGET', KEYS[1], 'revision', 'record', 'sets')
if not kept[1] then return redis.call('EXISTS', KEYS[2]) end
if kept[3] ~= '' then
    redis.call('PEXPIRE', KEYS[1], ARGV[2])
    redis.call('PEXPIRE', KEYS[2], ARGV[3])
    enter(kept[3], now, ARGV[2], ARGV[1])
end
return {{kept[1], kept[2]}}
"""
# KEYS: session, was. ARGV: member, revision before ('' none), revision, record, sets, ttl, ttl of was. Returns 1 if the
# session has that revision now.
_PUT = f"""{_TIME}{_SETS}
local kept = redis.call('HMGET', KEYS[1], 'revision', 'sets')
if kept[1] == ARGV[3] then return 1 end
if (kept[1] or '') ~= ARGV[2] then return 0 end
if kept[2] and kept[2] ~= ARGV[5] then leave(kept[2], ARGV[1]) end
redis.call('HSET', KEYS[1], 'revision', ARGV[3], 'record', ARGV[4], 'sets', ARGV[5])
redis.call('PEXPIRE', KEYS[1], ARGV[6])
if ARGV[5] == '' then
    redis.call('DEL', KEYS[2])
else
    redis.call('SET', KEYS[2], '', 'PX', ARGV[7])
    enter(ARGV[5], now, ARGV[6], ARGV[1])
end
return 1
"""
# KEYS: session, was. ARGV: member. Returns 1 if there was a session that had not ended.
_REMOVE = f"""{_SETS}
local sets = redis.call('HGET', KEYS[1], 'sets') or ''
leave(sets, ARGV[1])
redis.call('DEL', KEYS[1], KEYS[2])
return sets ~= '' and 1 or 0
"""
# KEYS: a connection's set. ARGV: limit, prefix of the sessions. Returns the number of removed sessions.
_REMOVE_BOUND = f"""{_SETS}
local removed = 0
for _, member in ipairs(redis.call('ZRANGE', KEYS[1], 0, ARGV[1] - 1)) do
    local key = ARGV[2] .. member
    local sets = redis.call('HGET', key, 'sets') or ''
    if string.find(sets .. ' ', KEYS[1] .. ' ', 1, true) then
        leave(sets, member)
        redis.call('DEL', key, key .. ':was')
        removed = removed + 1
    else
        redis.call('ZREM', KEYS[1], member)
    end
end
return removed
"""
# KEYS: a set. Returns the number of members that have not expired.
_COUNT = f"""{_TIME}
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', string.format('(%.3f', now))
return redis.call('ZCARD', KEYS[1])
"""
# KEYS: all. ARGV: limit, prefix of the sessions. Returns {record, milliseconds left, score} of each, the latest first.
_LIST = f"""{_TIME}
local found = {{}}
local members = redis.call('ZREVRANGEBYSCORE', KEYS[1], '+inf', now, 'WITHSCORES', 'LIMIT', 0, ARGV[1])
for place = 1, #members, 2 do
    local key = ARGV[2] .. members[place]
    local record = redis.call('HGET', key, 'record')
    if record then found[#found + 1] = {{record, redis.call('PTTL', key), members[place + 1]}} end
end
return found
"""


class RedisStore:
    """A store.Store in Redis. Connects at the first use, and again whenever the connection is lost.

    Args:
        url: See `redis_client.client_of`.
        ttl: Seconds until an unused session expires; for as long again its expiry is remembered.

    Raises:
        StartupError: the URL is not one of these.
    """

    def __init__(self, url: str, ttl: float) -> None:
        self._redis = client_of(url)
        clustered = isinstance(self._redis, RedisCluster)
        self._buckets = [_Bucket(f"{{{number}}}:") for number in range(BUCKETS)] if clustered else [_Bucket("")]
        self._free = asyncio.Semaphore(CONNECTIONS)
        self._ttl = ttl
        self._milliseconds = max(1, round(ttl * 1000))
        self._get = self._redis.register_script(_GET)
        self._put = self._redis.register_script(_PUT)
        self._remove = self._redis.register_script(_REMOVE)
        self._remove_bound = self._redis.register_script(_REMOVE_BOUND)
        self._count = self._redis.register_script(_COUNT)
        self._list = self._redis.register_script(_LIST)
        self._logged = -LOG_INTERVAL

    async def get(self, owner: str, session_id: str) -> Kept | None:
        """See store.Store."""
        bucket, member = self._place(owner, session_id)
        ttl = self._milliseconds
        async with self._answering():
            found: Any = await self._get(keys=bucket.keys(member), args=[member, ttl, 2 * ttl])
        if isinstance(found, list):
            revision, record = found
            return Kept(parse(record), revision)
        if found:
            raise expired(self._ttl)
        return None

    async def put(self, session: Session, before: bytes | None) -> bool:
        """See store.Store."""
        bucket, member = self._place(session.owner, session.session_id)
        arguments: list[bytes | str | int] = [
            member,
            before or b"",
            new_revision(),
            session.SerializeToString(),
            " ".join(bucket.sets(session)),
            max(1, round(lifetime(session, self._ttl) * 1000)),
            2 * self._milliseconds,
        ]
        async with self._answering():
            return bool(await self._put(keys=bucket.keys(member), args=arguments))

    async def remove(self, owner: str, session_id: str) -> bool:
        """See store.Store."""
        bucket, member = self._place(owner, session_id)
        async with self._answering():
            return bool(await self._remove(keys=bucket.keys(member), args=[member]))

    async def remove_bound(self, bound: bytes) -> int:
        """See store.Store."""
        removed = await self._of_each(
            lambda bucket: self._remove_bound(keys=[bucket.bound(bound)], args=[MOST_ENDED, bucket.sessions])
        )
        return sum(removed)

    async def count(self, model: ModelKey, bundle: bytes) -> int:
        """See store.Store."""
        return sum(await self._of_each(lambda bucket: self._count(keys=[bucket.model(model, bundle)])))

    async def owned(self, owner: str) -> int:
        """See store.Store."""
        return sum(await self._of_each(lambda bucket: self._count(keys=[bucket.owner(owner)])))

    async def listed(self, limit: int) -> list[Listed]:
        """See store.Store."""
        found = await self._of_each(lambda bucket: self._list(keys=[bucket.all], args=[limit, bucket.sessions]))
        latest = sorted((each for part in found for each in part), key=lambda each: float(each[2]), reverse=True)
        return [_listed(parse(record), milliseconds / 1000) for record, milliseconds, _ in latest[:limit]]

    def confirm_takeover(self) -> None:
        """See store.Store; there is no file."""

    async def close(self) -> None:
        """See store.Store."""
        with self._converted():
            await self._redis.aclose()

    def _place(self, owner: str, session_id: str) -> tuple["_Bucket", str]:
        """Returns the bucket of a session, and its name in the keys and sets there."""
        member = _hash(owner, session_id)
        return self._buckets[int(member[:8], 16) % len(self._buckets)], member

    async def _of_each(self, ask: Callable[["_Bucket"], Awaitable[Any]]) -> list[Any]:
        async def answer(bucket: _Bucket) -> Any:
            async with self._answering():
                return await ask(bucket)

        return await asyncio.gather(*map(answer, self._buckets))

    @asynccontextmanager
    async def _answering(self) -> AsyncIterator[None]:
        """Waits for a free connection, and converts errors as `_converted` does."""
        with self._converted():
            async with asyncio.timeout(TIMEOUT):
                await self._free.acquire()
            try:
                yield
            finally:
                self._free.release()

    @contextmanager
    def _converted(self) -> Iterator[None]:
        """Converts errors of Redis's client to domain errors, and logs them at intervals."""
        try:
            yield
        except (RedisError, OSError) as error:
            # Before version 7, Redis reports it within another error if a script meets it.
            if isinstance(error, OutOfMemoryError) or "OOM command not allowed" in str(error):
                raise SessionRoomError("the sessions' store is full") from error
            now = asyncio.get_running_loop().time()
            if now - self._logged >= LOG_INTERVAL:
                self._logged = now
                _log.warning("the sessions' store does not answer: %s: %s", type(error).__name__, error)
            raise SessionStoreError("the sessions' store does not answer") from error


class _Bucket:
    """Names of the keys that one script can reach.

    Args:
        tag: Part of each name, by which a cluster chooses the slot; empty if there is no cluster.

    Attributes:
        sessions: Prefix of the sessions.
        all: Set of all sessions.
    """

    def __init__(self, tag: str) -> None:
        self._prefix = f"unroll:{tag}"
        self.sessions = f"{self._prefix}session:"
        self.all = f"{self._prefix}sessions"

    def keys(self, member: str) -> list[str]:
        """Returns the keys of a session: its hash, and what outlives it."""
        return [f"{self.sessions}{member}", f"{self.sessions}{member}:was"]

    def model(self, model: ModelKey, bundle: bytes) -> str:
        """Returns the set of the sessions on a version's content."""
        return f"{self._prefix}sessions:{model}/{bundle.hex()}"

    def owner(self, name: str) -> str:
        """Returns the set of an owner's sessions."""
        return f"{self._prefix}owner:{_hash(name)}"

    def bound(self, connection: bytes) -> str:
        """Returns the set of the sessions that are bound to a connection."""
        return f"{self._prefix}bound:{connection.hex()}"

    def sets(self, session: Session) -> list[str]:
        """Returns the sets that a session is in."""
        if session.ended:
            return []
        snapshot = session.snapshot
        model = self.model(ModelKey(snapshot.model, snapshot.version), snapshot.bundle)
        found = [self.all, self.owner(session.owner), model]
        return [*found, self.bound(session.bound)] if session.bound else found


def _hash(*names: str) -> str:
    """Returns a name of one length and of safe characters, whatever those of the ids."""
    digest = hashlib.blake2b(digest_size=20)
    for part in map(str.encode, names):
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


def _listed(session: Session, expires_in: float) -> Listed:
    model = ModelKey(session.snapshot.model, session.snapshot.version)
    return Listed(session.owner, session.session_id, model, session.snapshot.step, expires_in)
