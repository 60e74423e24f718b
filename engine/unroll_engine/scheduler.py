"""What runs in the next tick. Pure policy: no threads, no arrays of values, and the clock is passed in."""

import heapq
from collections.abc import Callable
from functools import lru_cache
from typing import Generic, NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

PATIENCE = 60.0
"""Seconds: work without a deadline is ordered as if it had this one, so that deadlines never starve it."""
CALM = 0.05
"""Seconds without a stream's step after which bulk ticks may be long again."""
ALERT_SECONDS = 250e-6
"""How long a tick may take while streams are active, or twice its fixed cost where that is more: the next step of a
stream waits no longer than that."""


class Queued(Protocol):
    """What the scheduler must know of a job, and keeps in it; see jobs.Job."""

    cancelled: bool
    deadline: float
    taken: int
    arrived: float

    @property
    def interactive(self) -> bool:
        """Whether somebody waits for each step."""
        ...

    @property
    def size(self) -> int:
        """Sequences."""
        ...


JobT = TypeVar("JobT", bound=Queued)


class Slice(NamedTuple, Generic[JobT]):
    """Sequences `first` to `first + number - 1` of `job`, which leave the queue together."""

    job: JobT
    first: int
    number: int


class Queue(Generic[JobT]):
    """Work of one model that waits for lanes, by class: within one, earliest deadline first, then arrival.

    Args:
        lanes: Sequences of one class in flight, at most. There is room for a quarter more of both together, so
            neither class can take all lanes: a stream's step need not wait for a long bulk sequence to end, and bulk
            is never starved.
        drop: Told of work that is not run, with the cause, "expired" or "cancelled".
    """

    def __init__(self, lanes: int, drop: Callable[[JobT, str], None]) -> None:
        self._capacity = capacity_of(lanes)
        self._limit = lanes
        self._drop = drop
        self._interactive: list[tuple[float, int, JobT]] = []
        self._bulk: list[tuple[float, int, JobT]] = []
        self._arrivals = 0
        self._cancelled = 0

    def __len__(self) -> int:
        """Works that wait, cancelled ones among them."""
        return len(self._interactive) + len(self._bulk)

    def add(self, job: JobT, now: float) -> None:
        """Queues all sequences of `job` at time `now`."""
        job.arrived = now
        self._arrivals += 1
        entry = (min(job.deadline, now + PATIENCE), self._arrivals, job)
        heapq.heappush(self._interactive if job.interactive else self._bulk, entry)

    def cancel(self) -> None:
        """Notes that a work has been cancelled; where most of what waits is, it is swept out."""
        self._cancelled += 1
        if self._cancelled > 64 and 2 * self._cancelled > len(self):
            for heap in (self._interactive, self._bulk):
                left = [entry for entry in heap if entry[2].cancelled]
                heap[:] = [entry for entry in heap if not entry[2].cancelled]
                heapq.heapify(heap)
                for _, _, job in left:
                    self._drop(job, "cancelled")
            self._cancelled = 0

    def take(self, now: float, interactive: int, bulk: int) -> list[Slice[JobT]]:
        """Takes what may join the lanes; drops what is cancelled or expired.

        Args:
            now: Time.
            interactive: Lanes of streams in flight.
            bulk: Lanes of bulk work in flight.
        """
        taken: list[Slice[JobT]] = []
        if self._interactive:
            room = min(self._limit - interactive, self._capacity - interactive - bulk)
            interactive += self._take(self._interactive, room, now, taken)
        if self._bulk:
            self._take(self._bulk, min(self._limit - bulk, self._capacity - interactive - bulk), now, taken)
        return taken

    def _take(self, heap: list[tuple[float, int, JobT]], room: int, now: float, taken: list[Slice[JobT]]) -> int:
        begin = room
        while heap and room > 0:
            job = heap[0][2]
            if job.cancelled or job.deadline <= now:
                heapq.heappop(heap)
                self._drop(job, "cancelled" if job.cancelled else "expired")
                continue
            first = job.taken
            count = min(room, job.size - first)
            taken.append(Slice(job, first, count))
            job.taken += count
            room -= count
            if job.taken == job.size:
                heapq.heappop(heap)
        return begin - room


def capacity_of(lanes: int) -> int:
    """Lanes of both classes together, where each class may have `lanes`."""
    return lanes + (lanes + 3) // 4


class TickCost(NamedTuple):
    """What ticks cost, fitted to measurements: `fixed + (step + lane * lanes) * steps` seconds."""

    fixed: float
    step: float
    lane: float

    def seconds(self, lanes: int, steps: int) -> float:
        """Seconds that a tick is expected to take."""
        return self.fixed + (self.step + self.lane * lanes) * steps


def tick_steps(
    limit: int, cost: TickCost, remaining: NDArray[np.int64], *, interactive: int | None, exact: int | None, alert: bool
) -> int:
    """Chooses how many timesteps the next tick runs.

    A short tick pays its fixed cost for few steps, a long one computes padding after the ends of short lanes: the
    length with the most real timesteps a second is chosen, and less where somebody waits.

    Args:
        limit: The most that a tick may run.
        cost: What ticks cost.
        remaining: Steps that each lane still has to run, 1 or more each; at least one lane.
        interactive: The fewest steps that a stream's lane has left, so that it hears at once; None without such lanes.
        exact: The end that a tick must not pass: the fewest steps left to a lane whose state can't be read from the
            middle of a tick; None without such lanes.
        alert: Whether streams are active, so that the next step of one may come at any time.
    """
    lanes = len(remaining)
    limit = min(limit, interactive or limit, exact or limit, int(remaining.max()))
    if alert:
        # Never so short that most of it is the fixed cost.
        run = max(ALERT_SECONDS - cost.fixed, cost.fixed)
        limit = min(limit, int(run / (cost.step + cost.lane * lanes)))
    if limit <= 1:
        return 1
    lengths, rates = _lengths(limit, lanes, cost)
    best = (np.minimum(lengths, remaining).sum(axis=1) * rates).argmax()
    return int(lengths[best, 0])


_LENGTHS = (1, 2, 3, 4, 6, 8, 12, 16, 20, 24, 28, 32, 40, 48, 56, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
"""Lengths of ticks that are weighed, beside the longest that is possible."""


@lru_cache(1024)
def _lengths(limit: int, lanes: int, cost: TickCost) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The lengths to weigh, [lengths, 1], and how many ticks of each fit into a second."""
    lengths = np.array([length for length in _LENGTHS if length < limit] + [limit])
    return lengths[:, np.newaxis], 1 / (cost.fixed + (cost.step + cost.lane * lanes) * lengths)
