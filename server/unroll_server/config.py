"""Settings of the server: names, types, ranges and defaults. `sources` reads them."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from unroll_server.addresses import Address
from unroll_server.errors import StartupError

MAX_KEY_BYTES = 128
"""Most bytes in a key of a stream's sequence or of a session."""

# `shared:` replaces `memory` in the settings of workers.
_STORES = (
    "memory",
    "shared",
    "unix",
    *(f"{scheme}{kind}" for scheme in ("redis", "rediss") for kind in ("", "+sentinel", "+cluster")),
)


def _number(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("a number is required")
    return value


def _text(value: object) -> object:
    if isinstance(value, str) and (not value or "\0" in value):
        raise ValueError("text without NUL is required")
    return value


Count = Annotated[int, Field(ge=1, le=2**31 - 2), BeforeValidator(_number)]
"""A number of things. grpcio ends the process at one connection more than the limit."""
Queued = Annotated[int, Field(ge=1, le=2**62), BeforeValidator(_number)]
"""An amount of work that waits."""
MessageBytes = Annotated[int, Field(ge=1024, le=2**31 - 1), BeforeValidator(_number)]
"""A size of a message."""
Seconds = Annotated[float, Field(ge=0, le=1e9), BeforeValidator(_number)]
"""Thirty years at most: grpcio takes no larger number."""
Keepalive = Annotated[float, Field(ge=1, le=1e9), BeforeValidator(_number)]
"""Seconds between pings."""
Lifetime = Annotated[float, Field(gt=0, le=1e9), BeforeValidator(_number)]
"""Seconds that something is kept."""
Text = Annotated[str, BeforeValidator(_text)]
File = Annotated[Path, BeforeValidator(_text)]


class Tuning(BaseModel):
    """Settings that few deployments change: `[tuning]` of the file, UNROLL_TUNING_* of the environment."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_lanes: Count = Field(default=64, description="Most sequences of a class, streams or bulk, in one tick.")
    tick_steps: Count = Field(default=32, description="Most timesteps in a tick of all lanes.")
    max_sequences: Count = Field(default=4096, description="Most sequences in one Classify call.")
    max_steps: Count = Field(default=65536, description="Most timesteps of one sequence, or of one chunk.")
    max_open_sequences: Count = Field(default=10_000, description="Most sequences open on one Unroll stream.")
    max_queued_steps: Queued = Field(default=4_000_000, description="Most timesteps admitted and not yet answered.")
    max_queued_bytes: Queued = Field(default=2**29, description="Most bytes of values admitted and not yet answered.")
    max_sessions: Count = Field(default=100_000, description="Most sessions in memory; the longest unused is removed.")
    max_connections: Count = Field(default=10_000, description="Most connections of a process.")
    max_connection_age: Seconds = Field(
        default=0.0, description="Seconds for which a connection accepts new calls; 0: no limit."
    )
    keepalive: Keepalive = Field(default=60.0, description="Seconds of silence before a client is pinged.")


class Settings(BaseSettings):
    """Settings of the server.

    Each one except `tuning` is also a flag of `unroll-serve`.

    Raises:
        StartupError: one setting excludes another, or text can't be read.
        pydantic.ValidationError: a value has the wrong type or is out of range.
    """

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        env_prefix="UNROLL_",
        env_nested_delimiter="_",
        env_nested_max_split=1,
        env_ignore_empty=True,
        enable_decoding=False,
    )

    config: File | None = Field(
        default=None, description="TOML file of settings; docs/deployment.md has one with all of them."
    )
    models: Text = Field(
        title="FOLDER", description="Folder of NAME/VERSION/ bundles, or its URL: s3://..., gs://..., https://..."
    )
    models_cache: File | None = Field(
        default=None, description="Folder for copies of the models of a URL; by default in the user's cache."
    )
    versions: Text = Field(default="all", description="Versions of a model to serve: all, latest, or latest:N.")
    models_poll: Seconds = Field(
        default=5.0,
        description="Seconds between checks for new and removed versions; 0: only the admin listener checks.",
    )
    runtime: Literal["auto", "kernel", "onnx", "torchscript"] = Field(
        default="auto", description="Runtime of the models; auto: the step kernel if it can, else onnx."
    )
    device: Literal["cpu", "cuda"] = Field(default="cpu", description="Device for the models.")
    listen: Text = Field(
        default="127.0.0.1:50051", title="ADDRESS", description="HOST:PORT or unix:/PATH; port 0 picks a free one."
    )
    transport: Literal["auto", "native", "grpcio"] = Field(
        default="auto", description="HTTP/2 implementation; auto: native if it was compiled, else grpcio."
    )
    workers: Count = Field(default=1, description="Serving processes that share the port.")
    threads: Annotated[int, Field(ge=0, le=256), BeforeValidator(_number)] = Field(
        default=0,
        description="Threads of the step kernel in a process; 0: the cores, divided by the workers.",
    )
    max_concurrent_calls: Count = Field(default=1000, description="Most calls in flight on one connection.")
    max_message_bytes: MessageBytes = Field(default=2**24, description="Most bytes of one request.")
    drain_timeout: Seconds = Field(
        default=30.0, description="Seconds within which calls in flight may end after SIGTERM."
    )
    admin: Text | None = Field(
        default=None,
        title="ADDRESS",
        description="Address on which operators load models and list sessions; off if absent.",
    )
    metrics: Text | None = Field(
        default=None,
        title="HOST:PORT",
        description="Address from which Prometheus reads metrics over HTTP; off if absent.",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(default="info", description="Lowest level to log.")
    log_format: Literal["text", "json"] = Field(default="text", description="Format of log lines.")
    access_log: bool = Field(default=False, description="Log a line for each call.")
    tls_cert: File | None = Field(
        default=None, description="Certificate chain, PEM, reloaded when it changes; turns on TLS."
    )
    tls_key: File | None = Field(default=None, description="Private key of the certificate, PEM.")
    tls_client_ca: File | None = Field(
        default=None, description="Authorities of the clients' certificates, PEM; turns on mutual TLS."
    )
    tokens: File | None = Field(
        default=None, description="File of hashed bearer tokens and their identities, reloaded when it changes."
    )
    sessions: Text = Field(
        default="memory",
        title="STORE",
        description="Store of the sessions: memory, redis://HOST:PORT/DB, redis+sentinel://..., redis+cluster://....",
    )
    session_ttl: Lifetime = Field(default=3600.0, description="Seconds that an unused session is kept.")
    sessions_file: File | None = Field(default=None, description="File that keeps in-memory sessions across restarts.")
    tuning: Tuning = Tuning()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Restricts the sources to the arguments: `sources` knows their origins."""
        return (init_settings,)

    @model_validator(mode="after")
    def _check(self) -> Self:
        _ = self.listen_address, self.metrics_address, self.admin_address, self.versions_kept
        if self.listen_address.path and self.workers > 1:
            raise StartupError("--listen: only one process can listen on a Unix socket; needs --workers 1")
        if (self.tls_cert is None) != (self.tls_key is None):
            given, missing = ("--tls-cert", "--tls-key") if self.tls_cert else ("--tls-key", "--tls-cert")
            raise StartupError(f"{given}: needs {missing} too")
        if self.tls_client_ca and not self.tls_cert:
            raise StartupError("--tls-client-ca: needs --tls-cert and --tls-key")
        if self.admin_address and not (self.tokens or self.tls_client_ca or self.admin_address.is_local):
            problem = "anyone who reaches it may change what is served; needs --tokens or --tls-client-ca"
            raise StartupError(f"--admin: {self.admin} is not a loopback address: {problem}")
        if self.sessions.partition(":")[0] not in _STORES:
            # The value is not repeated: it can hold a password.
            raise StartupError(
                "--sessions: neither memory nor redis://HOST:PORT/DB, rediss://..., unix://PATH, redis+sentinel://..., redis+cluster://..."
            )
        if self.sessions_file and self.sessions != "memory":
            raise StartupError("--sessions-file: only for --sessions memory; Redis keeps its own")
        return self

    @property
    def versions_kept(self) -> int | None:
        """Number of versions of a model to serve, the newest good ones; None for all."""
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
        """Address to serve on."""
        return Address.of("--listen", self.listen)

    @property
    def metrics_address(self) -> Address | None:
        """Address of the metrics; None if they are not served."""
        return None if self.metrics is None else Address.of("--metrics", self.metrics, unix=False)

    @property
    def admin_address(self) -> Address | None:
        """Address of the admin listener; None if there is none."""
        return None if self.admin is None else Address.of("--admin", self.admin)

    @property
    def connections(self) -> "Connections":
        """Limits of a connection."""
        tuning = self.tuning
        return Connections(
            tuning.max_connections, self.max_concurrent_calls, tuning.max_connection_age, tuning.keepalive
        )

    @property
    def limits(self) -> "Limits":
        """Limits of one call."""
        tuning = self.tuning
        return Limits(tuning.max_sequences, tuning.max_steps, tuning.max_open_sequences, self.max_message_bytes)

    def announcement(self, served: str, address: str) -> str:
        """Returns the line that reports that `served` is served on `address`."""
        return f"serving {served} on {address} ({self.runtime}, {self.device})"

    def replace(self, **changes: Any) -> Self:
        """Returns the settings with changes, validated again."""
        return type(self)(**(self.model_dump() | changes))

    def to_json(self) -> str:
        """Returns the settings as text, for another process."""
        return json.dumps(self.model_dump(), default=str)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Parses the text of `to_json`."""
        return cls(**json.loads(text))


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of one call; see unroll.v1.Limits."""

    max_sequences: int
    max_steps: int
    max_open_sequences: int
    max_message_bytes: int


@dataclass(frozen=True, slots=True)
class Connections:
    """Limits of a connection.

    Attributes:
        most: Most connections of a process.
        calls: Most calls in flight on one connection.
        age: Seconds after which a connection refuses new calls; 0 for never.
        keepalive: Seconds of silence after which the other side is pinged.
    """

    most: int = 10_000
    calls: int = 1000
    age: float = 0.0
    keepalive: float = 60.0
