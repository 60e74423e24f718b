"""The server's settings, checked."""

from dataclasses import dataclass
from pathlib import Path

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

    def __post_init__(self) -> None:
        host, separator, port = self.listen.rpartition(":")
        if not separator or not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
            raise StartupError(f"--listen: {self.listen!r} is not HOST:PORT")

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
