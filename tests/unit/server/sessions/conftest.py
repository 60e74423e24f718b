"""Stores of every kind."""

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
from support.redis_server import RedisServer, needs_redis

from unroll_server.sessions.memory_store import MemoryStore
from unroll_server.sessions.redis_store import RedisStore
from unroll_server.sessions.store import Store


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A Redis that tests share, each with keys of its own."""
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture(params=["memory", "file", pytest.param("redis", marks=needs_redis)])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], Store]:
    """Opens a store of the same sessions with each call."""
    if request.param == "redis":
        url = request.getfixturevalue("redis_server").url
        return lambda: RedisStore(url, 60)
    if request.param == "file":
        return lambda: MemoryStore(60, 100, tmp_path / "sessions")
    return cache(lambda: MemoryStore(60, 100))
