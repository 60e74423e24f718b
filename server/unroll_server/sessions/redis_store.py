"""Sessions in Redis, shared by all replicas.

A session is a hash under `unroll:session:HASH`, the hash of owner and id, with Redis's own expiry. The key
`unroll:session:HASH:was` outlives it, to tell an expired session from one that never was. Sorted sets list all
sessions, those of a model version and those of an owner by their expiry. Each use is one script, so it is atomic and
can be retried: a write that was done already is recognized by its revision.
"""

import asyncio
import hashlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import redis.asyncio
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import OutOfMemoryError, RedisError

from unroll_engine.models.spec import ModelKey
from unroll_proto.v1.session_pb2 import Session
from unroll_server.errors import SessionRoomError, SessionStoreError, StartupError
from unroll_server.sessions.store import Kept, Listed, expired, lifetime, new_revision, parse

_log = logging.getLogger(__name__)

_SESSIONS = "unroll:session:"
_MODELS = "unroll:sessions:"
_OWNERS = "unroll:owner:"
_ALL = "unroll:sessions"
TIMEOUT = 2.0
"""Timeout in seconds of a connection attempt, and of an answer."""
CONNECTIONS = 64
"""Most connections to Redis; a call waits if none is free."""
LOG_INTERVAL = 10.0
"""Least seconds between two log lines about a Redis that does not answer."""

# Times are Redis's, in milliseconds, so that the replicas' clocks do not matter.
_TIME = """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
"""
# Sets drop expired members, and expire with their last member.
_INTO_LISTS = """
local function list(now, ttl, member, ...)
    for _, set in ipairs({...}) do
        redis.call('ZREMRANGEBYSCORE', set, '-inf', '(' .. now)
        redis.call('ZADD', set, now + ttl, member)
        redis.call('PEXPIRE', set, ttl)
    end
end
"""
# KEYS: session, was, all, the owner's. ARGV: ttl, ttl of was, member, prefix of the models' sets. Returns {revision,
# record}, else 1 if the session has expired.
_GET = f"""{_TIME}{_INTO_LISTS}local kept = redis.call('HMGET', KEYS[1], 'revision', 'record', 'model', 'ended')
if not kept[1] then return redis.call('EXISTS', KEYS[2]) end
if kept[4] == '0' then
    redis.call('PEXPIRE', KEYS[1], ARGV[1])
    redis.call('PEXPIRE', KEYS[2], ARGV[2])
    list(now, ARGV[1], ARGV[3], KEYS[3], KEYS[4], ARGV[4] .. kept[3])
end
return {{kept[1], kept[2]}}
"""
# KEYS: session, was, all, the owner's. ARGV: revision before ('' none), revision, record, model, ended, ttl, ttl of
# was, member, prefix. Returns 1 if the session has that revision now.
_PUT = f"""{_TIME}{_INTO_LISTS}local kept = redis.call('HMGET', KEYS[1], 'revision', 'model')
if kept[1] == ARGV[2] then return 1 end
if (kept[1] or '') ~= ARGV[1] then return 0 end
redis.call('HSET', KEYS[1], 'revision', ARGV[2], 'record', ARGV[3], 'model', ARGV[4], 'ended', ARGV[5])
redis.call('PEXPIRE', KEYS[1], ARGV[6])
if kept[2] and (kept[2] ~= ARGV[4] or ARGV[5] == '1') then redis.call('ZREM', ARGV[9] .. kept[2], ARGV[8]) end
if ARGV[5] == '1' then
    redis.call('DEL', KEYS[2])
    redis.call('ZREM', KEYS[3], ARGV[8])
    redis.call('ZREM', KEYS[4], ARGV[8])
else
    redis.call('SET', KEYS[2], '', 'PX', ARGV[7])
    list(now, ARGV[6], ARGV[8], KEYS[3], KEYS[4], ARGV[9] .. ARGV[4])
end
return 1
"""
# KEYS: session, was, all, the owner's. ARGV: member, prefix. Returns 1 if there was a session that had not ended.
_REMOVE = """
local kept = redis.call('HMGET', KEYS[1], 'model', 'ended')
redis.call('DEL', KEYS[1], KEYS[2])
redis.call('ZREM', KEYS[3], ARGV[1])
redis.call('ZREM', KEYS[4], ARGV[1])
if not kept[1] then return 0 end
redis.call('ZREM', ARGV[2] .. kept[1], ARGV[1])
return kept[2] == '0' and 1 or 0
"""
# KEYS: a model's or an owner's set. Returns the number of members that have not expired.
_COUNT = f"""{_TIME}
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', '(' .. now)
return redis.call('ZCARD', KEYS[1])
"""
# KEYS: all. ARGV: limit, prefix of the sessions. Returns {record, milliseconds left} of each, the latest first.
_LIST = f"""{_TIME}
local found = {{}}
for _, member in ipairs(redis.call('ZREVRANGEBYSCORE', KEYS[1], '+inf', now, 'LIMIT', 0, ARGV[1])) do
    local key = ARGV[2] .. member
    local record = redis.call('HGET', key, 'record')
    if record then found[#found + 1] = {{record, redis.call('PTTL', key)}} end
end
return found
"""


class RedisStore:
    """A store.Store in Redis. Connects at the first use, and again whenever the connection is lost.

    Args:
        url: redis://[[USER]:PASSWORD@]HOST:PORT/DB, rediss:// (TLS), or unix://PATH.
        ttl: Seconds until an unused session expires; for as long again its expiry is remembered.

    Raises:
        StartupError: the URL is not one of these.
    """

    def __init__(self, url: str, ttl: float) -> None:
        try:
            pool = redis.asyncio.BlockingConnectionPool.from_url(
                url,
                max_connections=CONNECTIONS,
                timeout=TIMEOUT,
                socket_timeout=TIMEOUT,
                socket_connect_timeout=TIMEOUT,
                # Retried at once, for an idle connection that was lost.
                retry=Retry(ExponentialBackoff(cap=0.1, base=0.01), 2, (RedisConnectionError,)),
                client_name="unroll",
            )
        except (ValueError, RedisError):
            # The URL is not repeated: it can hold a password.
            raise StartupError("--sessions: expected memory, redis://HOST:PORT/DB, rediss:// or unix://PATH") from None
        self._redis = redis.asyncio.Redis.from_pool(pool)
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
        ttl = self._milliseconds
        with self._answering():
            found: Any = await self._get(keys=_keys(owner, member), args=[ttl, 2 * ttl, member, _MODELS])
        if isinstance(found, list):
            revision, record = found
            return Kept(parse(record), revision)
        if found:
            raise expired(self._ttl)
        return None

    async def put(self, session: Session, before: bytes | None) -> bool:
        """See store.Store."""
        member = _member(session.owner, session.session_id)
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
            _MODELS,
        ]
        with self._answering():
            return bool(await self._put(keys=_keys(session.owner, member), args=arguments))

    async def remove(self, owner: str, session_id: str) -> bool:
        """See store.Store."""
        member = _member(owner, session_id)
        with self._answering():
            return bool(await self._remove(keys=_keys(owner, member), args=[member, _MODELS]))

    async def count(self, model: ModelKey, bundle: bytes) -> int:
        """See store.Store."""
        with self._answering():
            return int(await self._count(keys=[f"{_MODELS}{_content(model, bundle)}"]))

    async def owned(self, owner: str) -> int:
        """See store.Store."""
        with self._answering():
            return int(await self._count(keys=[f"{_OWNERS}{_member(owner)}"]))

    async def listed(self, limit: int) -> list[Listed]:
        """See store.Store."""
        with self._answering():
            found: Any = await self._list(keys=[_ALL], args=[limit, _SESSIONS])
        return [_listed(parse(record), milliseconds / 1000) for record, milliseconds in found]

    def confirm_takeover(self) -> None:
        """See store.Store; there is no file."""

    async def close(self) -> None:
        """See store.Store."""
        with self._answering():
            await self._redis.aclose()

    @contextmanager
    def _answering(self) -> Iterator[None]:
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


def _member(*names: str) -> str:
    # Hashed, so that ids of any characters are safe and of one length.
    digest = hashlib.blake2b(digest_size=20)
    for part in map(str.encode, names):
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


def _content(model: ModelKey, bundle: bytes) -> str:
    """Returns the name of a version's content."""
    return f"{model}/{bundle.hex()}"


def _keys(owner: str, member: str) -> list[str]:
    return [f"{_SESSIONS}{member}", f"{_SESSIONS}{member}:was", _ALL, f"{_OWNERS}{_member(owner)}"]


def _listed(session: Session, expires_in: float) -> Listed:
    model = ModelKey(session.snapshot.model, session.snapshot.version)
    return Listed(session.owner, session.session_id, model, session.snapshot.step, expires_in)
