"""The call in flight: its caller, its name, and the sizes that are logged, traced and counted."""

from contextvars import ContextVar

from unroll_engine.observer import Trace


class Call:
    """A call in flight.

    Attributes:
        identity: Name of the caller, from its token or its certificate; empty if callers are not told apart.
        request_id: Name of the call in logs, traces and trailers; empty if it has none.
        committed: True once the call has changed state that outlives it: it is too late to refuse it then.
        received: Messages read.
        received_bytes: Their size, uncompressed.
        sent: Messages written.
        sent_bytes: Their size, uncompressed.
        steps: Timesteps given to the engine.
        trace: The trace of the call; None if it is not traced.
    """

    # Defaults on the class: there is one object for each call, made without running any Python.
    identity: str = ""
    request_id: str = ""
    committed: bool = False
    received: int = 0
    received_bytes: int = 0
    sent: int = 0
    sent_bytes: int = 0
    steps: int = 0
    trace: Trace | None = None


current: ContextVar[Call] = ContextVar("call", default=Call())  # noqa: B039 (nobody reads the one outside of all calls)
"""The call that the running task belongs to. Set by transport/registry.py."""
