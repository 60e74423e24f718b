"""Settings of a web process."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from unroll_client import AsyncClient

MAX_BODY_BYTES = 1 << 24
"""Default limit of one request's body, as that of one message to the server."""


@dataclass(frozen=True, slots=True)
class Settings:
    """Settings of a web process.

    Attributes:
        connect: Makes the client of the servers; called once.
        target: Addresses of the servers, for scripts that the page writes.
        models: Folder of bundles, from which the page reads weights; None if there is none.
        metrics: HOST:PORT of the server's metrics, which the page shows; empty if there are none.
        data: Sequence files that the page offers.
        hosts: Names by which callers may address the process, without ports; empty for any.
        origins: Origins of other sites whose pages may call, such as "https://lab.example"; by default none.
        max_body_bytes: Most bytes of a request's body, compressed or not.
        body_timeout: Longest pause within a request's body, in seconds.
    """

    connect: Callable[[], AsyncClient]
    target: str = ""
    models: Path | None = None
    metrics: str = ""
    data: tuple[Path, ...] = ()
    hosts: frozenset[str] = frozenset()
    origins: frozenset[str] = frozenset()
    max_body_bytes: int = MAX_BODY_BYTES
    body_timeout: float = 30.0
