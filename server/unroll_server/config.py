"""The server's settings, checked."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from unroll_server.addresses import Address
from unroll_server.errors import StartupError

MAX_KEY_BYTES = 128
"""Bytes of a key of a stream's sequence or of a session, at most."""

_PATHS = ("models", "sessions_file", "tls_cert", "tls_key", "tls_client_ca", "tokens")

# `shared:` is what a parent makes of `memory` for its workers.
_STORES = ("memory", "shared", "redis", "rediss", "unix")


@dataclass(frozen=True, slots=True)
class Settings:
    """The options of `unroll-serve`; __main__.py says what each means.

    Raises:
        StartupError: an option is wrong, or two exclude each other.
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
        _ = self.listen_address, self.metrics_address, self.admin_address, self.versions_kept
        if self.listen_address.path and self.workers > 1:
            raise StartupError("--listen: only one process can listen on a Unix socket; needs --workers 1")
        if (self.tls_cert is None) != (self.tls_key is None):
            raise StartupError("--tls-cert, --tls-key: one is of no use without the other")
        if self.admin_address and not (self.tokens or self.tls_client_ca or self.admin_address.is_local):
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
    def listen_address(self) -> Address:
        """The address to serve on."""
        return Address.of("--listen", self.listen)

    @property
    def metrics_address(self) -> Address | None:
        """The address to serve metrics on; None if they are not served."""
        return None if self.metrics is None else Address.of("--metrics", self.metrics, unix=False)

    @property
    def admin_address(self) -> Address | None:
        """The address of the admin listener; None if there is none."""
        return None if self.admin is None else Address.of("--admin", self.admin)

    def announcement(self, served: str, address: str) -> str:
        """Returns the line that reports that `served` is served on `address`."""
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
