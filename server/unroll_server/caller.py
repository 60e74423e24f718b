"""Who calls: what the interceptors learn of a call, for the handler that runs in the same task."""

from collections.abc import Sequence
from contextvars import ContextVar
from typing import Protocol

identity: ContextVar[str] = ContextVar("identity", default="")
"""Name of the caller, from its token or its certificate; empty where callers are not told apart."""

request_id: ContextVar[str] = ContextVar("request_id", default="")
"""Names the call in logs, traces and answers."""

lasting: ContextVar[bool] = ContextVar("lasting", default=False)
"""Whether the call has changed what outlives it: to refuse it then comes too late."""


class Watched(Protocol):
    """A call of which more is told than figures.

    Attributes:
        steps: Timesteps that the engine was given for it.
    """

    steps: int

    @property
    def traced(self) -> bool:
        """Whether its time in the queue, and its ticks, are of interest."""
        ...

    def waited(self, model: str, seconds: float) -> None:
        """Work of it, for the model NAME/VERSION, has waited so long to be run, until now."""
        ...

    def ticked(
        self, others: "Sequence[Watched]", model: str, lanes: int, steps: int, real_steps: int, seconds: float
    ) -> None:
        """A tick, over now, ran work of this call and of others.

        Args:
            others: Those others that are traced.
            model: NAME/VERSION.
            lanes: Sequences in the tick.
            steps: Timesteps of each that were computed.
            real_steps: Timesteps, over all lanes, that belonged to sequences.
            seconds: How long it took.
        """
        ...


watched: ContextVar[Watched | None] = ContextVar("watched", default=None)
"""The call, where more is told of it than figures; see calls.py."""
