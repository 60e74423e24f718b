"""Scheduling policy: which sequences join the next tick, and how long it is. The clock is passed in."""

import heapq
from collections.abc import Callable
from functools import lru_cache
from typing import Generic, NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

IMPLICIT_DEADLINE = 60.0
"""Seconds to the deadline of a job that has none, so that others never starve it."""
CALM = 0.05
"""Seconds without an interactive job after which bulk ticks may be long again."""
ALERT_SECONDS = 250e-6
"""Seconds of a tick, at most, while streams are active, or twice its fixed cost if that is more: the next step of a
stream waits no longer."""


class Queued(Protocol):
    """The attributes of a job that the scheduler reads and writes; see jobs.Job."""

    cancelled: bool
    deadline: float
    taken: int
    arrived: float
    size: int

    @property
    def interactive(self) -> bool:
        """True if the caller waits for each step."""
        ...


JobT = TypeVar("JobT", bound=Queued)


class Slice(NamedTuple, Generic[JobT]):
    """Sequences `first` to `first + number - 1` of `job`, which leave the queue together."""

    job: JobT
    first: int
    number: int


class Queue(Generic[JobT]):
    """Jobs of one model that wait for lanes, interactive before bulk; then earliest deadline first, then arrival.

    Args:
        lanes: Most sequences of one class in flight. There is room for a quarter more of both together, so
            neither class can take all lanes: a stream's step need not wait for a long bulk sequence to end, and bulk
            is never starved.
        drop: Called for each job that is not run, with the cause, "expired" or "cancelled".

    Attributes:
        waiting: Jobs in the queue, cancelled ones included.
    """

    def __init__(self, lanes: int, drop: Callable[[JobT, str], None]) -> None:
        self._capacity = capacity_of(lanes)
        self._limit = lanes
        self._drop = drop
        self._interactive: list[tuple[float, int, JobT]] = []
        self._bulk: list[tuple[float, int, JobT]] = []
        self.waiting = 0
        self._arrivals = 0
        self._cancelled = 0

    def add(self, job: JobT, now: float) -> None:
        """Queues all sequences of `job` at time `now`."""
        job.arrived = now
        self.waiting += 1
        self._arrivals += 1
        entry = (min(job.deadline, now + IMPLICIT_DEADLINE), self._arrivals, job)
        heapq.heappush(self._interactive if job.interactive else self._bulk, entry)

    def cancel(self) -> None:
        """Records that a queued job was cancelled; once most are, removes them."""
        self._cancelled += 1
        if self._cancelled > 64 and 2 * self._cancelled > self.waiting:
            for heap in (self._interactive, self._bulk):
                cancelled = [entry for entry in heap if entry[2].cancelled]
                heap[:] = [entry for entry in heap if not entry[2].cancelled]
                heapq.heapify(heap)
                self.waiting -= len(cancelled)
                for _, _, job in cancelled:
                    self._drop(job, "cancelled")
            self._cancelled = 0

    def take(self, now: float, interactive: int, bulk: int) -> list[Slice[JobT]]:
        """Removes the sequences that may join the lanes; drops jobs that are cancelled or expired.

        Args:
            now: Time.
            interactive: Lanes of interactive jobs in flight.
            bulk: Lanes of bulk jobs in flight.
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
                self.waiting -= 1
                self._drop(job, "cancelled" if job.cancelled else "expired")
                continue
            first = job.taken
            count = min(room, job.size - first)
            taken.append(Slice(job, first, count))
            job.taken += count
            room -= count
            if job.taken == job.size:
                heapq.heappop(heap)
                self.waiting -= 1
        return begin - room


def capacity_of(lanes: int) -> int:
    """Returns the lanes of both classes together, if each class may have `lanes`."""
    return lanes + (lanes + 3) // 4


class TickCost(NamedTuple):
    """The cost of ticks, fitted to measurements: `fixed + (step + lane * lanes) * steps` seconds."""

    fixed: float
    step: float
    lane: float

    def seconds(self, lanes: int, steps: int) -> float:
        """Returns the expected seconds of a tick."""
        return self.fixed + (self.step + self.lane * lanes) * steps


def tick_steps(
    limit: int, cost: TickCost, remaining: NDArray[np.int64], *, interactive: int | None, exact: int | None, alert: bool
) -> int:
    """Chooses how many timesteps the next tick runs.

    A short tick pays its fixed cost for few steps, a long one computes padding after the ends of short lanes: the
    length with the most real timesteps per second is chosen, and a shorter one if a caller waits.

    Args:
        limit: Most timesteps of the tick.
        cost: Cost of ticks.
        remaining: Steps that each lane still has to run, 1 or more each; at least one lane.
        interactive: The fewest steps left to an interactive lane, which is answered at once; None without such lanes.
        exact: The fewest steps left to a lane whose state can't be read in mid-tick, so that the tick must end there;
            None without such lanes.
        alert: True if streams are active, so that the next step of one may arrive at any time.
    """
    lanes = len(remaining)
    limit = min(limit, interactive or limit, exact or limit, int(remaining.max()))
    if alert:
        limit = min(limit, alert_steps(cost, lanes))
    if limit <= 1:
        return 1
    lengths, rates = _lengths(limit, lanes, cost)
    best = (np.minimum(lengths, remaining).sum(axis=1) * rates).argmax()
    return int(lengths[best, 0])


def alert_steps(cost: TickCost, lanes: int) -> int:
    """Returns the most timesteps of a tick while streams are active."""
    # Never so short that most of it is the fixed cost.
    return int(max(ALERT_SECONDS - cost.fixed, cost.fixed) / (cost.step + cost.lane * lanes))


_LENGTHS = (1, 2, 3, 4, 6, 8, 12, 16, 20, 24, 28, 32, 40, 48, 56, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
"""Lengths of ticks to choose from, besides the longest possible."""


@lru_cache(1024)
def _lengths(limit: int, lanes: int, cost: TickCost) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Returns the lengths to choose from, [lengths, 1], and the ticks of each per second."""
    lengths = np.array([length for length in _LENGTHS if length < limit] + [limit])
    return lengths[:, np.newaxis], 1 / (cost.fixed + (cost.step + cost.lane * lanes) * lengths)
