"""Who calls: what the interceptors learn of a call, for the handler that runs in the same task."""

from contextvars import ContextVar

from unroll_engine.observer import ObservedCall

identity: ContextVar[str] = ContextVar("identity", default="")
"""Name of the caller, from its token or its certificate; empty where callers are not told apart."""

request_id: ContextVar[str] = ContextVar("request_id", default="")
"""Names the call in logs, traces and answers."""

lasting: ContextVar[bool] = ContextVar("lasting", default=False)
"""Whether the call has changed what outlives it: to refuse it then comes too late."""


watched: ContextVar[ObservedCall | None] = ContextVar("watched", default=None)
"""The call, where more is told of it than figures; see middleware/access_log.py."""
