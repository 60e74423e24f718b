"""What may wait to be computed: bounded in timesteps, in bytes, in time and by caller. The clock is passed in."""

import math
from collections import defaultdict
from collections.abc import Callable
from typing import NamedTuple, Protocol

from unroll_engine.errors import OverloadedError
from unroll_engine.rate import Rate

STEPS, BYTES, DEADLINE, IDENTITY = "QUEUED_STEPS", "QUEUED_BYTES", "DEADLINE_TOO_NEAR", "IDENTITY_LIMIT"
"""Reasons of a refusal: what there is too much of in the queue, that the answer would come too late, or that the caller
has as much queued as it may."""
MARGIN = 0.5
"""Share of the time to a deadline that waiting and computing may be expected to take. The rest is for the way back, and
for the way here, of which the server knows nothing: a deadline comes as the seconds that were left when it was sent."""
UNREAD = 15 / 16
"""Share of the queue, and of the time, past which a call that is not read yet is refused; the rest is for streams and
what is read: to refuse it then costs the most."""
STRAIN = 1.0
"""Seconds after a refusal for which callers are turned away before their message is read, if they have to be."""
GRAIN = 0.05
"""Seconds between two deadlines that count as one."""
_FIRST = -1
"""The deadline, in grains, that streams count as: they go before all others."""
PATIENCE = 60.0
"""Seconds that work without a deadline is ordered by; see scheduler.PATIENCE."""
UNKNOWN_RETRY = 1.0
"""Seconds after which to try again, while no rate is known."""
RETRY = (0.02, 30.0)
"""Least and most seconds after which to try again."""


class Share(NamedTuple):
    """What one caller may have queued."""

    steps: float = math.inf
    bytes: float = math.inf


LimitsOf = Callable[[str], Share | None]
"""The share of a caller by its identity; None where it has no limit of its own."""


class Asked(Protocol):
    """What is asked of work; see jobs.Job."""

    owner: str
    deadline: float
    bytes: int
    due: int

    @property
    def interactive(self) -> bool:
        """Whether it goes before bulk work."""
        ...

    @property
    def steps(self) -> int:
        """Timesteps."""
        ...


class _Held:
    """What one caller has queued."""

    __slots__ = ("bytes", "steps")

    def __init__(self) -> None:
        self.steps = 0
        self.bytes = 0


class Admission:
    """Counts what is accepted and not yet answered, and refuses what is too much.

    How much time the queue stands for is known by its rate: timesteps answered per second while it is never short of
    work, whatever they were spent on. Until that has been measured nothing is refused for its deadline.

    Args:
        max_steps: Timesteps queued, at most. What is alone is accepted at any size.
        max_bytes: Bytes of values and states queued, at most.
        full_tick: Timesteps of a tick with every lane in use: with twice as many queued, ticks are full.
        limits_of: Shares of callers; None where they have none.
    """

    def __init__(self, max_steps: int, max_bytes: int, full_tick: int = 1, limits_of: LimitsOf | None = None) -> None:
        self._limits_of = limits_of
        self._held: defaultdict[str, _Held] = defaultdict(_Held)
        self.steps = 0
        self.bytes = 0
        self._max_steps = max_steps
        self._max_bytes = max_bytes
        # Timesteps by deadline, in grains; streams come before all.
        self._due: dict[int, int] = defaultdict(int)
        self._refused = -math.inf
        self._rate = Rate(2 * full_tick)

    def admit(self, job: Asked, now: float) -> None:
        """Takes work onto the books, until `release`.

        Raises:
            OverloadedError: there is no room for it, or it can't be done in time.
        """
        steps, size = job.steps, job.bytes
        if self.steps:
            if self.steps + steps > self._max_steps:
                self._refuse_full(STEPS, now)
            if self.bytes + size > self._max_bytes:
                self._refuse_full(BYTES, now)
            self._check_time(job.deadline, steps, now, interactive=job.interactive)
        else:
            self._rate.begin(now)
        if self._limits_of:
            self._check_share(job.owner, steps, size, now)
            held = self._held[job.owner]
            held.steps += steps
            held.bytes += size
        self.steps += steps
        self.bytes += size
        job.due = _FIRST if job.interactive else int(min(job.deadline, now + PATIENCE) / GRAIN)
        self._due[job.due] += steps

    def release(self, job: Asked, now: float, *, computed: bool) -> None:
        """Takes work off the books.

        Args:
            job: What was admitted.
            now: Time.
            computed: Whether it was done; else it failed, expired or was left.
        """
        steps = job.steps
        if self._limits_of:
            held = self._held[job.owner]
            held.steps -= steps
            held.bytes -= job.bytes
            if not held.steps:
                del self._held[job.owner]
        self.steps -= steps
        self.bytes -= job.bytes
        left = self._due[job.due] - steps
        if left:
            self._due[job.due] = left
        else:
            del self._due[job.due]
        self._rate.end(steps if computed else 0, self.steps, now)

    def strained(self, now: float) -> bool:
        """Whether a caller was refused of late, so that it pays to ask `check_unread` before a message is read."""
        return now - self._refused < STRAIN

    def check_unread(self, owner: str, deadline: float, now: float, *, interactive: bool = False) -> None:
        """Refuses a call whose message is not read yet, where it is clear that it will be.

        Args:
            owner: Identity of the caller.
            deadline: Of the call; infinite where it has none.
            now: Time.
            interactive: Whether it goes before bulk work.

        Raises:
            OverloadedError: there is no room for it, or it can't be done in time.
        """
        if not self.steps:
            return
        if reason := self.full:
            self._refuse_full(reason, now)
        self._check_time(deadline, 1, now, UNREAD * MARGIN, interactive=interactive)
        if self._limits_of:
            self._check_share(owner, 1, 1, now)

    @property
    def full(self) -> str:
        """The reason for which no call is taken that is not read yet, whoever asks; empty where there is room."""
        if self.steps > UNREAD * self._max_steps:
            return STEPS
        return BYTES if self.bytes > UNREAD * self._max_bytes else ""

    def horizon(self, now: float, *, interactive: bool = False) -> float:
        """Seconds to the nearest deadline of new work that is not refused; infinite where the queue is full.

        What `check_unread` says of all calls at once, apart from the shares of callers.
        """
        if self.full:
            return math.inf
        rate = self.rate(now)
        seconds = 0.0
        if rate is None:
            return seconds
        before = 0
        for due, count in [(_FIRST, self._due.get(_FIRST, 0))] if interactive else sorted(self._due.items()):
            if due * GRAIN > now + seconds:
                break
            before += count
            seconds = before / (UNREAD * MARGIN * rate)
        return seconds

    def rate(self, now: float) -> float | None:
        """Timesteps a second that are computed under load; None where that is not known, or no longer."""
        return self._rate.of(now)

    def _check_time(
        self, deadline: float, steps: int, now: float, margin: float = MARGIN, *, interactive: bool
    ) -> None:
        if deadline == math.inf or (rate := self.rate(now)) is None:
            return
        budget = margin * (deadline - now) * rate
        # What comes later does not stand before it, but to count that is only worth it where it may matter.
        if deadline <= now or self.steps + steps <= budget:
            return
        grain = _FIRST if interactive else int(deadline / GRAIN)
        before = sum(count for due, count in self._due.items() if due <= grain)
        if before and before + steps > budget:
            self._refuse(DEADLINE, "too much is queued for an answer within the deadline", now)

    def _check_share(self, owner: str, steps: int, size: int, now: float) -> None:
        share, held = self._limits_of and self._limits_of(owner), self._held.get(owner)
        if share is None or held is None:
            return
        if held.steps + steps > share.steps:
            self._refuse(IDENTITY, f"{owner} has too much queued: {share.steps:.0f} timesteps at most", now)
        if held.bytes + size > share.bytes:
            self._refuse(IDENTITY, f"{owner} has too much queued: {share.bytes:.0f} bytes at most", now)

    def _refuse_full(self, reason: str, now: float) -> None:
        most = f"{self._max_steps} timesteps" if reason == STEPS else f"{self._max_bytes} bytes"
        self._refuse(reason, f"the queue is full: {most} at most", now)

    def _refuse(self, reason: str, description: str, now: float) -> None:
        if reason != IDENTITY:
            self._refused = now
        rate = self.rate(now)
        # By then half of what waits is computed, so that there is room for more than the first who comes.
        seconds = UNKNOWN_RETRY if rate is None else self.steps / 2 / rate
        # Rounded, so that refusals of the same moment are alike, and made once.
        raise OverloadedError(description, round(min(max(seconds, RETRY[0]), RETRY[1]), 2), reason)
