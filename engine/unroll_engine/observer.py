"""Interfaces that the engine reports to: metrics, and the traces of calls."""

from collections.abc import Sequence
from typing import Any, Protocol


class ModelMetrics(Protocol):
    """Counters of one model version."""

    def tick(self, lanes: int, steps: int, real_steps: int, seconds: float, trace: "Trace | None") -> None:
        """Counts a tick.

        Args:
            lanes: Sequences in it.
            steps: Timesteps computed for each.
            real_steps: Timesteps, over all lanes, that belonged to sequences; the others were padding.
            seconds: Its duration.
            trace: The trace of a call in it; None if no call is traced.
        """
        ...

    def waited(self, seconds: float, trace: "Trace | None") -> None:
        """Counts a job's time in the queue; `trace` is None if its call is not traced."""
        ...

    def dropped(self, cause: str, sequences: int) -> None:
        """Counts sequences dropped before they were computed, by cause: "expired" or "cancelled"."""
        ...

    def serves(self, more: int) -> None:
        """Records that the model was added (1) or removed (-1)."""
        ...


class Gauges(Protocol):
    """Numbers that are written by their index."""

    def __setitem__(self, index: int, value: float, /) -> None:
        """Sets a number."""
        ...


class QueueMetrics(Protocol):
    """Counters of the queue of all models."""

    @property
    def queued(self) -> Gauges:
        """Timesteps and bytes that are admitted and not yet answered, [steps, bytes]; written by the engine."""
        ...

    def refused(self, cause: str, count: int = 1) -> None:
        """Counts a refusal by cause: "steps", "bytes", "deadline" or "identity"."""
        ...


class Metrics(Protocol):
    """Counters of an engine."""

    @property
    def queue(self) -> QueueMetrics:
        """Counters of the queue of all models."""
        ...

    def of(self, model: str) -> ModelMetrics:
        """Counters of a model version, by NAME/VERSION."""
        ...


class NoMetrics:
    """Metrics, ModelMetrics and QueueMetrics that count nothing."""

    @property
    def queue(self) -> "NoMetrics":
        """See Metrics."""
        return self

    @property
    def queued(self) -> Gauges:
        """See QueueMetrics."""
        return [0.0, 0.0]

    def of(self, model: str) -> "NoMetrics":
        """See Metrics."""
        return self

    def tick(self, lanes: int, steps: int, real_steps: int, seconds: float, trace: "Trace | None") -> None:
        """See ModelMetrics."""

    def waited(self, seconds: float, trace: "Trace | None") -> None:
        """See ModelMetrics."""

    def dropped(self, cause: str, sequences: int) -> None:
        """See ModelMetrics."""

    def serves(self, more: int) -> None:
        """See ModelMetrics."""

    def refused(self, cause: str, count: int = 1) -> None:
        """See QueueMetrics."""


class Trace(Protocol):
    """The trace of a call while its jobs are in the engine."""

    @property
    def ids(self) -> bytes:
        """Id of the trace, 16 bytes, and of the span in it, 8 bytes."""
        ...

    def waited(self, model: str, seconds: float) -> None:
        """Reports that a job of the call, for the model NAME/VERSION, left the queue now, after so many seconds."""
        ...

    def ticked(
        self, others: Sequence[Any], model: str, lanes: int, steps: int, real_steps: int, seconds: float
    ) -> None:
        """Reports a tick that ended now and ran jobs of this call and of others.

        Args:
            others: The traces of the other calls in the tick.
            model: NAME/VERSION.
            lanes: Sequences in the tick.
            steps: Timesteps computed for each.
            real_steps: Timesteps, over all lanes, that belonged to sequences.
            seconds: Its duration.
        """
        ...
