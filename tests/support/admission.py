"""Admission with the test's clock, and jobs for it."""

import math
from collections import deque
from dataclasses import dataclass

from unroll_engine.admission import AdmissionController, QuotaOf

ROOMY = 10**12
"""A limit that nothing reaches."""
RATE = 100_000.0
"""Timesteps per second of `work_off`."""
PIECE = 100
"""Timesteps of its jobs."""


@dataclass
class Asked:
    """A job as admission sees it."""

    steps: int
    bytes: int = 1
    deadline: float = math.inf
    interactive: bool = False
    owner: str = ""
    due: int = 0
    over: bool = False
    cancelled: bool = False


class Admission(AdmissionController):
    """A controller whose clock the test sets."""

    def __init__(self, max_steps: int, max_bytes: int, full_tick: int = 1, quota_of: QuotaOf | None = None) -> None:
        self.now = 0.0
        super().__init__(max_steps, max_bytes, full_tick, quota_of, clock=lambda: self.now)

    def at(self, now: float) -> "Admission":
        """Sets the time."""
        self.now = now
        return self

    def ends(self, job: Asked, now: float, *, computed: bool) -> None:
        """Releases a job at a time."""
        job.over = computed
        self.at(now).release(job)


def work_off(admission: Admission, queued: int, rate: float = RATE, seconds: float = 1.0, now: float = 100.0) -> float:
    """Keeps `queued` pieces queued and completes `rate` timesteps per second; then completes all at once.

    Returns:
        The time afterwards.
    """
    waiting: deque[Asked] = deque()
    for _ in range(int(seconds * rate / PIECE)):
        while len(waiting) < queued:
            waiting.append(Asked(PIECE))
            admission.at(now).admit(waiting[-1])
        now += PIECE / rate
        admission.ends(waiting.popleft(), now, computed=True)
    for job in waiting:
        admission.ends(job, now, computed=False)
    return now
