"""The server's settings, checked."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from unroll_server.errors import StartupError


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

    def __post_init__(self) -> None:
        _host_and_port("--listen", self.listen)
        if self.metrics is not None:
            _host_and_port("--metrics", self.metrics)

    @property
    def listen_address(self) -> tuple[str, int]:
        """Host, an IPv6 address without its brackets, and port to serve on."""
        return _host_and_port("--listen", self.listen)

    @property
    def metrics_address(self) -> tuple[str, int] | None:
        """Host and port to serve metrics on; None where they are not served."""
        return None if self.metrics is None else _host_and_port("--metrics", self.metrics)

    def announcement(self, served: str, address: str) -> str:
        """The line that says that `served` is served on `address`, HOST:PORT."""
        return f"serving {served} on {address} ({self.runtime}, {self.device})"

    def to_json(self) -> str:
        """The settings as text, for another process."""
        return json.dumps(asdict(self) | {"models": str(self.models)})

    @classmethod
    def from_json(cls, text: str) -> Self:
        """What `to_json` gave."""
        options = json.loads(text)
        return cls(**options | {"models": Path(options["models"])})

    @property
    def limits(self) -> "Limits":
        """What one call may carry."""
        return Limits(self.max_sequences, self.max_steps, self.max_open_sequences, self.max_message_bytes)


def _host_and_port(option: str, value: str) -> tuple[str, int]:
    host, separator, port = value.rpartition(":")
    if not separator or not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise StartupError(f"{option}: {value!r} is not HOST:PORT")
    return host.removeprefix("[").removesuffix("]"), int(port)


@dataclass(frozen=True, slots=True)
class Limits:
    """What one call may carry; see unroll.v1.Limits."""

    max_sequences: int
    max_steps: int
    max_open_sequences: int
    max_message_bytes: int
