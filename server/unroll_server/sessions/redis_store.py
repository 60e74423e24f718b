"""Sessions in Redis, shared by all replicas.

A session is a hash under `unroll:session:HASH`, the hash of owner and id, with Redis's own expiry. The key
`unroll:session:HASH:was` outlives it, to tell an expired session from one that never was. Sorted sets list all
sessions, those of a model version, of an owner and of a connection by their expiry. Each use is one script, so it is
atomic and can be retried: a write that was done already is recognized by its revision.

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
# Sets drop expired members, and expire with their last member. The set of a connection comes last: there may be none.
_INTO_LISTS = """
local function list(now, ttl, member, ...)
    for _, set in ipairs({...}) do
        redis.call('ZREMRANGEBYSCORE', set, '-inf', string.format('(%.3f', now))
        redis.call('ZADD', set, now + ttl, member)
        redis.call('PEXPIRE', set, ttl)
    end
end
"""
# KEYS: session, was, all, the owner's. ARGV: ttl, ttl of was, member, prefix of the models' sets. Returns {revision,
# record}, else 1 if the session has expired.
_GET = f"""{_TIME}{_INTO_LISTS}
local kept = redis.call('HMGET', KEYS[1], 'revision', 'record', 'model', 'ended', 'bound')
if not kept[1] then return redis.call('EXISTS', KEYS[2]) end
if kept[4] == '0' then
    redis.call('PEXPIRE', KEYS[1], ARGV[1])
    redis.call('PEXPIRE', KEYS[2], ARGV[2])
    list(now, ARGV[1], ARGV[3], KEYS[3], KEYS[4], ARGV[4] .. kept[3], kept[5] or nil)
end
return {{kept[1], kept[2]}}
"""
# KEYS: session, was, all, the owner's, the connection's if it is bound to one. ARGV: revision before ('' none),
# revision, record, model, ended, ttl, ttl of was, member, prefix. Returns 1 if the session has that revision now.
_PUT = f"""{_TIME}{_INTO_LISTS}
local kept = redis.call('HMGET', KEYS[1], 'revision', 'model', 'bound')
if kept[1] == ARGV[2] then return 1 end
if (kept[1] or '') ~= ARGV[1] then return 0 end
redis.call('HSET', KEYS[1], 'revision', ARGV[2], 'record', ARGV[3], 'model', ARGV[4], 'ended', ARGV[5])
redis.call('PEXPIRE', KEYS[1], ARGV[6])
if kept[3] and kept[3] ~= KEYS[5] then
    redis.call('HDEL', KEYS[1], 'bound')
    redis.call('ZREM', kept[3], ARGV[8])
end
if KEYS[5] then redis.call('HSET', KEYS[1], 'bound', KEYS[5]) end
if kept[2] and (kept[2] ~= ARGV[4] or ARGV[5] == '1') then redis.call('ZREM', ARGV[9] .. kept[2], ARGV[8]) end
if ARGV[5] == '1' then
    redis.call('DEL', KEYS[2])
    redis.call('ZREM', KEYS[3], ARGV[8])
    redis.call('ZREM', KEYS[4], ARGV[8])
else
    redis.call('SET', KEYS[2], '', 'PX', ARGV[7])
    list(now, ARGV[6], ARGV[8], KEYS[3], KEYS[4], ARGV[9] .. ARGV[4], KEYS[5])
end
return 1
"""
# KEYS: session, was, all, the owner's, the connection's if only a session that is bound to it is meant. ARGV: member,
# prefix. Returns 1 if there was a session that had not ended.
_REMOVE = """
local kept = redis.call('HMGET', KEYS[1], 'model', 'ended', 'bound')
if KEYS[5] and kept[3] ~= KEYS[5] then return 0 end
redis.call('DEL', KEYS[1], KEYS[2])
redis.call('ZREM', KEYS[3], ARGV[1])
redis.call('ZREM', KEYS[4], ARGV[1])
if kept[3] then redis.call('ZREM', kept[3], ARGV[1]) end
if not kept[1] then return 0 end
redis.call('ZREM', ARGV[2] .. kept[1], ARGV[1])
return kept[2] == '0' and 1 or 0
"""
# KEYS: a model's or an owner's set. Returns the number of members that have not expired.
_COUNT = f"""{_TIME}
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', string.format('(%.3f', now))
return redis.call('ZCARD', KEYS[1])
"""
# KEYS: all, or a connection's. ARGV: limit, prefix of the sessions. Returns {record, milliseconds left, score} of each,
# the latest first.
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
        self._count = self._redis.register_script(_COUNT)
        self._list = self._redis.register_script(_LIST)
        self._logged = -LOG_INTERVAL

    async def get(self, owner: str, session_id: str) -> Kept | None:
        """See store.Store."""
        member = _member(owner, session_id)
        bucket = self._bucket_of(member)
        ttl = self._milliseconds
        async with self._answering():
            found: Any = await self._get(keys=bucket.keys(owner, member), args=[ttl, 2 * ttl, member, bucket.models])
        if isinstance(found, list):
            revision, record = found
            return Kept(parse(record), revision)
        if found:
            raise expired(self._ttl)
        return None

    async def put(self, session: Session, before: bytes | None) -> bool:
        """See store.Store."""
        member = _member(session.owner, session.session_id)
        bucket = self._bucket_of(member)
        snapshot = session.snapshot
        ttl = max(1, round(lifetime(session, self._ttl) * 1000))
        arguments: list[bytes | str | int] = [
            before or b"",
            new_revision(),
            session.SerializeToString(),
            _content(ModelKey(snapshot.model, snapshot.version), snapshot.bundle),
            int(session.ended),
            ttl,
            2 * self._milliseconds,
            member,
            bucket.models,
        ]
        async with self._answering():
            return bool(await self._put(keys=bucket.keys(session.owner, member, session.bound), args=arguments))

    async def remove(self, owner: str, session_id: str, bound: bytes = b"") -> bool:
        """See store.Store.

        Args:
            owner: Owner of the session.
            session_id: Id of the session.
            bound: Deletes the session only if it is bound to this connection.
        """
        member = _member(owner, session_id)
        bucket = self._bucket_of(member)
        async with self._answering():
            return bool(await self._remove(keys=bucket.keys(owner, member, bound), args=[member, bucket.models]))

    async def remove_bound(self, bound: bytes) -> int:
        """See store.Store."""
        found = await self._of_each(
            lambda bucket: self._list(keys=[bucket.bound(bound)], args=[MOST_ENDED, bucket.sessions])
        )
        sessions = [parse(record) for part in found for record, _, _ in part]
        return sum(await asyncio.gather(*(self.remove(each.owner, each.session_id, bound) for each in sessions)))

    async def count(self, model: ModelKey, bundle: bytes) -> int:
        """See store.Store."""
        content = _content(model, bundle)
        return sum(await self._of_each(lambda bucket: self._count(keys=[f"{bucket.models}{content}"])))

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

    def _bucket_of(self, member: str) -> "_Bucket":
        return self._buckets[int(member[:8], 16) % len(self._buckets)]

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
        models: Prefix of the sets of the model versions.
        all: Set of all sessions.
    """

    def __init__(self, tag: str) -> None:
        self._prefix = f"unroll:{tag}"
        self.sessions = f"{self._prefix}session:"
        self.models = f"{self._prefix}sessions:"
        self.all = f"{self._prefix}sessions"

    def owner(self, name: str) -> str:
        """Returns the set of an owner's sessions."""
        return f"{self._prefix}owner:{_member(name)}"

    def bound(self, connection: bytes) -> str:
        """Returns the set of the sessions that are bound to a connection."""
        return f"{self._prefix}bound:{connection.hex()}"

    def keys(self, owner: str, member: str, bound: bytes = b"") -> list[str]:
        """Returns the keys of a session, in the order of the scripts; with that of a connection if there is one."""
        keys = [f"{self.sessions}{member}", f"{self.sessions}{member}:was", self.all, self.owner(owner)]
        return [*keys, self.bound(bound)] if bound else keys


def _member(*names: str) -> str:
    # Hashed, so that ids of any characters are safe and of one length.
    digest = hashlib.blake2b(digest_size=20)
    for part in map(str.encode, names):
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


def _content(model: ModelKey, bundle: bytes) -> str:
    """Returns the name of a version's content."""
    return f"{model}/{bundle.hex()}"


def _listed(session: Session, expires_in: float) -> Listed:
    model = ModelKey(session.snapshot.model, session.snapshot.version)
    return Listed(session.owner, session.session_id, model, session.snapshot.step, expires_in)
