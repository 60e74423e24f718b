"""Clients of Redis by URL: one server, a primary that sentinels know, or a cluster."""

from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from redis.asyncio import ConnectionPool, Redis, RedisCluster, Sentinel
from redis.asyncio.cluster import ClusterNode
from redis.asyncio.connection import SSLConnection, parse_url
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError

from unroll_server.errors import StartupError

TIMEOUT = 2.0
"""Timeout in seconds of a connection attempt, and of an answer."""
SENTINEL_PORT = 26379
PORT = 6379
EXPECTED = (
    "--sessions: expected memory, redis://HOST:PORT/DB, rediss:// (TLS), unix://PATH, "
    "redis+sentinel://HOST:PORT,.../SERVICE/DB or redis+cluster://HOST:PORT,..."
)


def client_of(url: str) -> "Redis | RedisCluster":
    """Makes a client, which connects at its first command and finds a new primary after a failover.

    Args:
        url: redis://[[USER]:PASSWORD@]HOST:PORT/DB, unix://PATH, redis+sentinel://[...@]HOST:PORT,.../SERVICE[/DB] or
            redis+cluster://[...@]HOST:PORT,...; `rediss` for TLS. The query has further options of Redis's client, such
            as ssl_ca_certs; sentinels have sentinel_username and sentinel_password.

    Raises:
        StartupError: the URL is not one of these.
    """
    try:
        return _client_of(url)
    except (ValueError, TypeError, RedisError):
        # The URL is not repeated: it can hold a password.
        raise StartupError(EXPECTED) from None


def _client_of(url: str) -> "Redis | RedisCluster":
    scheme, _, kind = urlsplit(url).scheme.partition("+")
    options: dict[str, Any] = {
        "socket_timeout": TIMEOUT,
        "socket_connect_timeout": TIMEOUT,
        # Retried at once, for an idle connection that was lost.
        "retry": Retry(ExponentialBackoff(cap=0.1, base=0.01), 2, (RedisConnectionError,)),
        "client_name": "unroll",
    }
    if not kind:
        return Redis.from_pool(ConnectionPool.from_url(url, **options))
    parts = urlsplit(url)
    credentials, at, hosts = parts.netloc.rpartition("@")
    first = hosts.partition(",")[0]
    # Of one host, which Redis's own reader of URLs understands.
    options |= parse_url(parts._replace(scheme=scheme, netloc=f"{credentials}{at}{first}", path="").geturl())
    del options["host"]
    options.pop("port", None)
    if options.pop("connection_class", None) is SSLConnection:
        options["ssl"] = True
    if kind == "cluster":
        nodes = [ClusterNode(host, port) for host, port in _addresses(hosts, PORT)]
        return _Cluster(nodes, options)
    service, _, database = parts.path.strip("/").partition("/")
    if not service:
        raise ValueError("no service")
    alike = {name: value for name, value in options.items() if name.startswith(("ssl", "socket_"))}
    own = {name: options.pop(f"sentinel_{name}", None) for name in ("username", "password")}
    sentinels: Any = Sentinel  # it has no types
    sentinels = sentinels(_addresses(hosts, SENTINEL_PORT), sentinel_kwargs=_given(own) | alike, **options)
    primary: Redis = sentinels.master_for(service, redis_class=_Primary, db=int(database or 0))
    return primary


class _Primary(Redis):
    """A client of the primary that sentinels name; also closes the connections to these."""

    async def aclose(self, close_connection_pool: bool | None = None) -> None:
        """Closes every connection."""
        await super().aclose(close_connection_pool)
        manager: Any = self.connection_pool
        for sentinel in manager.sentinel_manager.sentinels:
            await sentinel.aclose()


class _Cluster(RedisCluster):
    """A cluster's client that also closes the connections by which it found the nodes."""

    def __init__(self, nodes: list[ClusterNode], options: Mapping[str, Any]) -> None:
        super().__init__(startup_nodes=nodes, **options)
        self._asked_first = list(self.nodes_manager.startup_nodes.values())

    async def aclose(self) -> None:
        """Closes every connection."""
        await super().aclose()
        for node in self._asked_first:
            await node.disconnect()


def _addresses(hosts: str, port: int) -> list[tuple[str, int]]:
    found = [urlsplit(f"//{each}") for each in hosts.split(",")]
    if not all(each.hostname for each in found):
        raise ValueError("no host")
    return [(str(each.hostname), each.port or port) for each in found]


def _given(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}
