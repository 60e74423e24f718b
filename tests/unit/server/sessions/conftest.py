"""Stores of every kind."""

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
from support.redis_server import RedisServer, needs_redis
from support.redis_topologies import in_a_cluster, needs_whole_redis, on_a_socket, with_a_sentinel, with_tls

from unroll_server.sessions.memory_store import MemoryStore
from unroll_server.sessions.redis_store import RedisStore
from unroll_server.sessions.store import Store


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A Redis that tests share, each with keys of its own."""
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture(scope="session")
def tls_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with with_tls(tmp_path_factory.mktemp("redis-tls")) as url:
        yield url


@pytest.fixture(scope="session")
def socket_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with on_a_socket(tmp_path_factory.mktemp("redis-socket")) as url:
        yield url


@pytest.fixture(scope="session")
def sentinel_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with with_a_sentinel(tmp_path_factory.mktemp("redis-sentinel")) as watched:
        yield watched.url


@pytest.fixture(scope="session")
def cluster_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with in_a_cluster(tmp_path_factory.mktemp("redis-cluster")) as url:
        yield url


WHOLE = ("tls", "socket", "sentinel", "cluster")


@pytest.fixture(
    params=[
        "memory",
        "file",
        pytest.param("redis", marks=needs_redis),
        *(pytest.param(kind, marks=needs_whole_redis) for kind in WHOLE),
    ]
)
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], Store]:
    """Opens a store of the same sessions with each call."""
    if request.param == "redis":
        url = request.getfixturevalue("redis_server").url
        return lambda: RedisStore(url, 60)
    if request.param in WHOLE:
        whole: str = request.getfixturevalue(f"{request.param}_url")
        return lambda: RedisStore(whole, 60)
    if request.param == "file":
        return lambda: MemoryStore(60, 100, tmp_path / "sessions")
    return cache(lambda: MemoryStore(60, 100))
