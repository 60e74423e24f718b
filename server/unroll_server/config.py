"""The server's settings, checked."""

import ipaddress
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from unroll_server.errors import StartupError

_PATHS = ("models", "sessions_file", "tls_cert", "tls_key", "tls_client_ca", "tokens")

# `shared:` is what a parent makes of `memory` for its workers.
_STORES = ("memory", "shared", "redis", "rediss", "unix")


@dataclass(frozen=True, slots=True)
class Settings:
    """What `unroll-serve` can be told; __main__.py says what each means.

    Raises:
        StartupError: settings that do not go together.
    """

    models: Path
    listen: str
    runtime: str
    device: str
    max_lanes: int
    tick_steps: int
    max_sequences: int
    max_steps: int
    max_open_sequences: int
    max_message_bytes: int
    max_queued_steps: int
    drain_timeout: float
    log_level: str
    front: str = "grpcio"
    workers: int = 1
    metrics: str | None = None
    versions: str = "all"
    models_poll: float = 5.0
    admin: str | None = None
    sessions: str = "memory"
    session_ttl: float = 3600.0
    max_sessions: int = 100_000
    sessions_file: Path | None = None
    max_queued_bytes: int = 2**29
    max_connections: int = 10_000
    max_concurrent_calls: int = 1000
    max_connection_age: float = 0.0
    keepalive: float = 60.0
    tls_cert: Path | None = None
    tls_key: Path | None = None
    tls_client_ca: Path | None = None
    tokens: Path | None = None
    log_format: str = "text"
    access_log: bool = False

    def __post_init__(self) -> None:
        _host_and_port("--listen", self.listen)
        for option in ("metrics", "admin"):
            if (value := getattr(self, option)) is not None:
                _host_and_port(f"--{option}", value)
        _ = self.versions_kept
        if (self.tls_cert is None) != (self.tls_key is None):
            raise StartupError("--tls-cert, --tls-key: one is of no use without the other")
        if self.admin_address and not (self.tokens or self.tls_client_ca or _is_loopback(self.admin_address[0])):
            problem = "whoever reaches it may change what is served; needs --tokens or --tls-client-ca"
            raise StartupError(f"--admin: {self.admin} is not a loopback address: {problem}")
        if self.sessions.partition(":")[0] not in _STORES:
            # Not told in full: it can hold a password.
            raise StartupError("--sessions: neither memory nor redis://HOST:PORT/DB, rediss://..., unix://PATH")
        if self.sessions_file and self.sessions != "memory":
            raise StartupError("--sessions-file: only for --sessions memory; Redis keeps its own")
        if self.tls_client_ca and not self.tls_cert:
            raise StartupError("--tls-client-ca: needs --tls-cert and --tls-key")

    @property
    def versions_kept(self) -> int | None:
        """How many versions of a model are served, the newest good ones; None for all."""
        if self.versions == "all":
            return None
        policy, separator, number = self.versions.partition(":")
        if policy == "latest" and not separator:
            return 1
        if policy == "latest" and number.isascii() and number.isdigit() and int(number[:10]) > 0:
            return int(number[:10])
        raise StartupError(f"--versions: {self.versions!r} is not all, latest, or latest:N with N of 1 or more")

    @property
    def listen_address(self) -> tuple[str, int]:
        """Host, an IPv6 address without its brackets, and port to serve on."""
        return _host_and_port("--listen", self.listen)

    @property
    def metrics_address(self) -> tuple[str, int] | None:
        """Host and port to serve metrics on; None where they are not served."""
        return None if self.metrics is None else _host_and_port("--metrics", self.metrics)

    @property
    def admin_address(self) -> tuple[str, int] | None:
        """Host and port of the admin listener; None where there is none."""
        return None if self.admin is None else _host_and_port("--admin", self.admin)

    def announcement(self, served: str, address: str) -> str:
        """The line that says that `served` is served on `address`, HOST:PORT."""
        return f"serving {served} on {address} ({self.runtime}, {self.device})"

    def to_json(self) -> str:
        """The settings as text, for another process."""
        return json.dumps(asdict(self), default=str)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """What `to_json` gave."""
        options = json.loads(text)
        paths = {name: Path(options[name]) for name in _PATHS if options[name] is not None}
        return cls(**options | paths)

    @property
    def connections(self) -> "Connections":
        """What a connection may do."""
        return Connections(self.max_connections, self.max_concurrent_calls, self.max_connection_age, self.keepalive)

    @property
    def limits(self) -> "Limits":
        """What one call may carry."""
        return Limits(self.max_sequences, self.max_steps, self.max_open_sequences, self.max_message_bytes)


def _host_and_port(option: str, value: str) -> tuple[str, int]:
    host, separator, port = value.rpartition(":")
    if not separator or not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise StartupError(f"{option}: {value!r} is not HOST:PORT")
    return host.removeprefix("[").removesuffix("]"), int(port)


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@dataclass(frozen=True, slots=True)
class Limits:
    """What one call may carry; see unroll.v1.Limits."""

    max_sequences: int
    max_steps: int
    max_open_sequences: int
    max_message_bytes: int


@dataclass(frozen=True, slots=True)
class Connections:
    """What a connection may do.

    Attributes:
        most: Connections of a process at once.
        calls: Calls in flight on one connection.
        age: Seconds after which a connection takes no more calls; 0 for never.
        keepalive: Seconds of silence after which the other side is pinged.
    """

    most: int = 10_000
    calls: int = 1000
    age: float = 0.0
    keepalive: float = 60.0
