"""The way into the engine's queue: asks whether there is room, by the clock, and counts."""

import math
import time

from unroll_engine.admission import BYTES, DEADLINE, IDENTITY, STEPS, Admission
from unroll_engine.errors import OverloadedError
from unroll_engine.jobs import Job
from unroll_engine.observer import QueueMetrics

_CAUSES = {STEPS: "steps", BYTES: "bytes", DEADLINE: "deadline", IDENTITY: "identity"}
"""What the metrics call the reasons of refusals."""


class AdmissionController:
    """Keeps the books of what is accepted and not yet answered. Its methods are called on one event loop.

    Args:
        admission: What may be queued.
        metrics: Counts refusals, and what is queued.
    """

    def __init__(self, admission: Admission, metrics: QueueMetrics) -> None:
        self._admission = admission
        self._metrics = metrics

    def enter(self, job: Job) -> None:
        """Takes work onto the books, until `leave`.

        Raises:
            OverloadedError: there is no room for it, it can't be done in time, or its caller has had its share.
        """
        admission = self._admission
        try:
            admission.admit(job, time.monotonic())
        except OverloadedError as error:
            self._metrics.refused(_CAUSES[error.reason])
            raise
        self._metrics.queued(admission.steps, admission.bytes)

    def leave(self, job: Job) -> None:
        """Takes work off the books."""
        admission = self._admission
        admission.release(job, time.monotonic(), computed=job.over and not job.cancelled)
        self._metrics.queued(admission.steps, admission.bytes)

    def strained(self) -> bool:
        """Whether callers are refused these days, so that it pays to ask `check_unread` before a message is read."""
        return self._admission.strained(time.monotonic())

    def horizon(self, interactive: bool) -> float:
        """Seconds to the nearest deadline of a call that is not refused; infinite where the queue is full.

        Args:
            interactive: Of calls that go before bulk work; else of bulk work.
        """
        return self._admission.horizon(time.monotonic(), interactive=interactive)

    @property
    def full(self) -> str:
        """What the queue is full of, as the reason of a refusal; empty where there is room."""
        return self._admission.full

    def refused(self, cause: str) -> None:
        """Counts a refusal by somebody else; see ServerMetrics."""
        self._metrics.refused(cause)

    def check_unread(self, owner: str, remaining: float | None, interactive: bool) -> None:
        """Refuses a call whose message is not read yet, where it is clear that it will be.

        Args:
            owner: Identity of the caller.
            remaining: Seconds until the call's deadline; None where it has none.
            interactive: Whether it goes before bulk work.

        Raises:
            OverloadedError: there is no room for it, it can't be done in time, or its caller has had its share.
        """
        now = time.monotonic()
        try:
            deadline = math.inf if remaining is None else now + remaining
            self._admission.check_unread(owner, deadline, now, interactive=interactive)
        except OverloadedError as error:
            self._metrics.refused(_CAUSES[error.reason])
            raise
