"""The call in flight: its caller, its id, and the sizes for logs, traces and metrics."""

import asyncio
from contextvars import ContextVar

from unroll_engine.observer import Trace


class Call:
    """A call in flight.

    Attributes:
        identity: Name of the caller, from its token or certificate; empty without authentication.
        request_id: Name of the call in logs, traces and trailers; empty if it has none.
        committed: True once the call has changed lasting state; then it is too late to refuse it.
        received: Messages read.
        received_bytes: Their size, uncompressed.
        sent: Messages written.
        sent_bytes: Their size, uncompressed.
        steps: Timesteps given to the engine.
        trace: The trace of the call; None if it is not traced.
        waited: Seconds that it waited for the engine before its handler began.
    """

    # Defaults are on the class, so that making an object for each call runs no Python.
    identity: str = ""
    request_id: str = ""
    committed: bool = False
    received: int = 0
    received_bytes: int = 0
    sent: int = 0
    sent_bytes: int = 0
    steps: int = 0
    trace: Trace | None = None
    waited: float = 0.0


current: ContextVar[Call] = ContextVar("call", default=Call())  # noqa: B039 (nobody reads the one outside of all calls)
"""The call that runs; set by transport/registry.py."""


async def in_task() -> None:
    """Continues in a task, which timeouts and groups of tasks need: calls that give the engine work may have none."""
    if asyncio.current_task() is None:
        await asyncio.sleep(0)
