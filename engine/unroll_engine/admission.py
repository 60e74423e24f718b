"""Overload control: bounds what is admitted and not yet answered, in timesteps, bytes, time, and by caller."""

import math
import time
from collections import defaultdict
from collections.abc import Callable
from typing import NamedTuple, NoReturn, Protocol

from unroll_engine.errors import IDENTITY_LIMIT, OverloadedError, over_quota
from unroll_engine.observer import NoMetrics, QueueMetrics
from unroll_engine.scheduler import IMPLICIT_DEADLINE
from unroll_engine.service_rate import ServiceRate

STEPS, BYTES, DEADLINE = "QUEUED_STEPS", "QUEUED_BYTES", "DEADLINE_TOO_NEAR"
"""Reasons of a refusal, beside IDENTITY_LIMIT: too many timesteps queued, too many bytes, a late answer."""
_CAUSES = {STEPS: "steps", BYTES: "bytes", DEADLINE: "deadline", IDENTITY_LIMIT: "identity"}
"""Names of the reasons in metrics."""
MARGIN = 0.5
"""Share of the time to a deadline that queueing and computing may take. The rest is for the network: a deadline arrives
as the seconds that were left when it was sent."""
UNREAD = 15 / 16
"""Share of the queue for calls whose message is not read yet. The rest is for streams and for messages already read,
whose refusal costs the most."""
UNREAD_MARGIN = 3 / 8
"""The same as MARGIN for calls whose message is not read yet. Until it is, time passes and the rate changes."""
OVERLOADED = 1.0
"""Seconds after a refusal during which calls are checked before their message is read."""
GRAIN = 0.05
"""Seconds between two deadlines that count as one."""
_FIRST = -1
"""The deadline, in grains, of interactive jobs, which go before all others."""
UNKNOWN_RETRY = 1.0
"""Seconds after which to retry while no rate is known."""
RETRY = (0.02, 30.0)
"""Least and most seconds after which to retry."""
AHEAD = 0.01
"""Seconds of work that keep the engine busy until it gets more."""
FULL_TICKS = 4
"""Full ticks of work that do so at the least."""
MEAN_WEIGHT = 0.02
"""Weight of a single job in the mean timesteps of one."""


QuotaOf = Callable[[str], int | None]
"""Returns the most timesteps that a caller, by its identity, may have queued; None if it has no quota."""


class Admissible(Protocol):
    """The attributes of a job that admission reads and writes; see jobs.Job."""

    owner: str
    deadline: float
    bytes: int
    due: int
    steps: int
    over: bool
    cancelled: bool

    @property
    def interactive(self) -> bool:
        """True if the job goes before bulk jobs."""
        ...


class Expected(Protocol):
    """The attributes of a bulk job that is not made yet; admission sets `due` and the likely `steps`."""

    deadline: float
    bytes: int
    due: int
    steps: int


class Refusal(NamedTuple):
    """Calls that an overloaded server refuses before it reads their message: too much is queued before their deadline.

    Attributes:
        rate: Timesteps that may be queued before a call for each second to its deadline; 0: every call is refused.
        call: Mean timesteps of a call, by which the queue grows with each that is not refused.
        due: Deadlines on the clock, ascending, and the timesteps queued up to each.
        error: The error that they end with.
    """

    rate: float
    call: float
    due: list[tuple[float, float]]
    error: OverloadedError


class AdmissionController:
    """Accounts for the jobs that are admitted and not yet answered. Used on one event loop.

    The queue is bounded in time by the measured rate of timesteps. While no rate is known, no deadline is refused.

    Args:
        max_steps: Most timesteps queued. A single job is admitted at any size.
        max_bytes: Most bytes of values and states queued.
        full_tick: Timesteps of a tick with every lane in use; with twice as many queued, ticks are full.
        quota_of: Quotas of callers; None if no caller has one.
        metrics: Counts refusals and what is queued.
        clock: Returns the time in seconds; deadlines are on this clock.

    Attributes:
        steps: Timesteps queued, or reserved.
        bytes: Bytes queued, or reserved.
        clock: As given.
        overloaded_until: Time on the clock, `OVERLOADED` seconds after the last refusal.
    """

    def __init__(
        self,
        max_steps: int,
        max_bytes: int,
        full_tick: int = 1,
        quota_of: QuotaOf | None = None,
        metrics: QueueMetrics | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.steps = 0
        self.bytes = 0
        self._ample = FULL_TICKS * full_tick
        self._max_steps = max_steps
        self._max_bytes = max_bytes
        self._quota_of = quota_of
        self._metrics = metrics or NoMetrics()
        self._gauges = self._metrics.queued
        self.clock = clock
        # Timesteps queued by identity, if there are quotas.
        self._queued: defaultdict[str, int] = defaultdict(int)
        # Timesteps by deadline, in grains.
        self._due: dict[int, int] = defaultdict(int)
        self.overloaded_until = -math.inf
        self._rate = ServiceRate(2 * full_tick)
        # Mean timesteps of a job, by kind: bulk, interactive.
        self._mean = [0.0, 0.0]

    def admit(self, job: Admissible) -> None:
        """Accounts for a job, until `release`.

        Raises:
            OverloadedError: there is no room for it, it can't be answered in time, or its caller's quota is used up.
        """
        now, steps, size = self.clock(), job.steps, job.bytes
        if self.steps:
            if self.steps + steps > self._max_steps:
                self._refuse(self._full(STEPS, now), now)
            if self.bytes + size > self._max_bytes:
                self._refuse(self._full(BYTES, now), now)
            self._check_time(job.deadline, steps, now, job.interactive)
        else:
            self._rate.since = now
        if self._quota_of:
            self._check_quota(job.owner, steps, now)
            self._queued[job.owner] += steps
        self._mean[job.interactive] += MEAN_WEIGHT * (steps - self._mean[job.interactive])
        job.due = _FIRST if job.interactive else _grain(job.deadline, now)
        self._count(job.due, steps, size)
        self._gauges[0], self._gauges[1] = self.steps, self.bytes

    def release(self, job: Admissible) -> None:
        """Removes a job from the account; its steps count for the rate if it is over and was not cancelled."""
        steps = job.steps
        if self._quota_of:
            self._queued[job.owner] -= steps
            if not self._queued[job.owner]:
                del self._queued[job.owner]
        self._count(job.due, -steps, -job.bytes)
        self._gauges[0], self._gauges[1] = self.steps, self.bytes
        self._rate.end(steps if job.over and not job.cancelled else 0, self.steps, self.clock())

    def reserve(self, job: Expected, now: float) -> None:
        """Accounts for a job that is to be made when the engine has room for it, until `cancel`."""
        job.due = _grain(job.deadline, now)
        job.steps = self.likely_steps
        self._count(job.due, job.steps, job.bytes)

    def cancel(self, job: Expected) -> None:
        """Removes a job from the account that is made now, or never."""
        self._count(job.due, -job.steps, -job.bytes)

    @property
    def likely_steps(self) -> int:
        """Timesteps that a bulk job is likely to have."""
        return int(self._mean[False]) + 1

    @property
    def ahead(self) -> float:
        """Timesteps that keep the engine busy until it gets more; infinite while its rate is not known."""
        rate = self.rate
        return math.inf if rate is None else max(self._ample, AHEAD * rate)

    def _count(self, due: int, steps: int, size: int) -> None:
        self.steps += steps
        self.bytes += size
        left = self._due[due] + steps
        if left:
            self._due[due] = left
        else:
            del self._due[due]

    def check_unread(self, owner: str, remaining: float | None, interactive: bool) -> None:
        """Refuses a call whose message is not read yet, if its jobs are sure to be refused.

        Args:
            owner: Identity of the caller.
            remaining: Seconds to the call's deadline; None if it has none.
            interactive: True if its jobs go before bulk jobs.

        Raises:
            OverloadedError: there is no room for it, it can't be answered in time, or its caller's quota is used up.
        """
        if not self.steps:
            return
        now = self.clock()
        if self.steps > UNREAD * self._max_steps:
            self._refuse(self._full(STEPS, now), now)
        if self.bytes > UNREAD * self._max_bytes:
            self._refuse(self._full(BYTES, now), now)
        deadline = math.inf if remaining is None else now + remaining
        self._check_time(deadline, 1, now, interactive, UNREAD_MARGIN)
        if self._quota_of:
            self._check_quota(owner, 1, now)

    def refusal(self, interactive: bool) -> Refusal | None:
        """Returns which calls `check_unread` refuses at this moment, whatever their caller; None: no deadline matters.

        Args:
            interactive: True for calls whose jobs go before bulk jobs.
        """
        now = self.clock()
        if self.steps > UNREAD * self._max_steps:
            return Refusal(0.0, 0.0, [], self._full(STEPS, now))
        if self.bytes > UNREAD * self._max_bytes:
            return Refusal(0.0, 0.0, [], self._full(BYTES, now))
        rate = self._rate.of(now)
        if rate is None:
            return None
        due: list[tuple[float, float]] = []
        before = 0
        for deadline in sorted(self._due):
            if deadline == _FIRST or not interactive:
                before += self._due[deadline]
                due.append((deadline * GRAIN, before))
        return Refusal(UNREAD_MARGIN * rate, self._mean[interactive], due, self._late(now))

    def record_refused(self, reason: str, count: int) -> None:
        """Counts calls that were refused by what `refusal` returned."""
        self._metrics.refused(_CAUSES[reason], count)
        self.overloaded_until = self.clock() + OVERLOADED

    @property
    def rate(self) -> float | None:
        """Timesteps computed per second under load; None if not measured recently."""
        return self._rate.of(self.clock())

    def _check_time(self, deadline: float, steps: int, now: float, interactive: bool, margin: float = MARGIN) -> None:
        rate = self._rate.of(now)
        if rate is None or math.isinf(deadline):
            return
        budget = margin * (deadline - now) * rate
        # No sum over the deadlines is needed while there is time for all that is queued.
        if deadline <= now or self.steps + steps <= budget:
            return
        grain = _FIRST if interactive else int(deadline / GRAIN)
        before = sum(count for due, count in self._due.items() if due <= grain)
        if before and before + steps > budget:
            self._refuse(self._late(now), now)

    def _check_quota(self, owner: str, steps: int, now: float) -> None:
        # A caller without queued jobs is admitted at any size, as is a job in an empty queue.
        queued = self._queued.get(owner)
        quota = self._quota_of(owner) if queued and self._quota_of else None
        if queued and quota is not None and queued + steps > quota:
            # One caller over its quota does not overload the server.
            self._metrics.refused(_CAUSES[IDENTITY_LIMIT])
            raise over_quota(owner, quota, "timesteps queued", self._retry_after(now))

    def _full(self, reason: str, now: float) -> OverloadedError:
        most = f"{self._max_steps} timesteps" if reason == STEPS else f"{self._max_bytes} bytes"
        return OverloadedError(f"the queue is full: {most} at most", self._retry_after(now), reason)

    def _late(self, now: float) -> OverloadedError:
        return OverloadedError("too much is queued for an answer within the deadline", self._retry_after(now), DEADLINE)

    def _refuse(self, error: OverloadedError, now: float) -> NoReturn:
        self._metrics.refused(_CAUSES[error.reason])
        self.overloaded_until = now + OVERLOADED
        try:
            raise error
        finally:
            # Its traceback refers to this frame: nothing is left for the garbage collector.
            del error

    def _retry_after(self, now: float) -> float:
        rate = self._rate.of(now)
        # By then half of the queue is computed, which leaves room for several callers.
        seconds = UNKNOWN_RETRY if rate is None else self.steps / 2 / rate
        # To one digit, so that refusals are equal for a while: they are serialized once, and compress to a few bytes.
        return float(f"{min(max(seconds, RETRY[0]), RETRY[1]):.0e}")


def _grain(deadline: float, now: float) -> int:
    return int(min(deadline, now + IMPLICIT_DEADLINE) / GRAIN)
