"""What runs in the next tick. Pure policy: no threads, no clock, no arrays."""

from collections import deque
from collections.abc import Iterable
from typing import Generic, Protocol, TypeVar


class Queued(Protocol):
    """What the scheduler must know of work; see work.Work."""

    cancelled: bool

    @property
    def interactive(self) -> bool:
        """Whether somebody waits for each step."""
        ...

    @property
    def size(self) -> int:
        """Sequences."""
        ...


WorkT = TypeVar("WorkT", bound=Queued)

BULK_TURN = 4
"""While both wait, one of so many free lanes goes to bulk work, so that it never starves."""


class Queue(Generic[WorkT]):
    """Work of one model that waits for lanes: interactive before bulk, by arrival within a class."""

    def __init__(self) -> None:
        self._interactive: deque[WorkT] = deque()
        self._bulk: deque[WorkT] = deque()
        # Sequences already taken of the work at the head of each class.
        self._taken = {True: 0, False: 0}
        self._turn = 0

    def add(self, work: WorkT) -> None:
        """Queues all sequences of `work`."""
        (self._interactive if work.interactive else self._bulk).append(work)

    def __bool__(self) -> bool:
        """Whether anything waits."""
        return bool(self._interactive or self._bulk)

    def take(self, free: int) -> list[tuple[WorkT, int]]:
        """Takes up to `free` sequences, each as its work and its index there; cancelled work is dropped."""
        taken: list[tuple[WorkT, int]] = []
        while len(taken) < free and self:
            queue = self._next_class()
            work = queue[0]
            index = self._taken[work.interactive]
            if not work.cancelled:
                taken.append((work, index))
                index += 1
            if work.cancelled or index == work.size:
                queue.popleft()
                index = 0
            self._taken[work.interactive] = index
        return taken

    def _next_class(self) -> deque[WorkT]:
        if not self._interactive or not self._bulk:
            return self._interactive or self._bulk
        self._turn = (self._turn + 1) % BULK_TURN
        return self._bulk if self._turn == 0 else self._interactive


def tick_steps(limit: int, remaining: Iterable[int], exact: Iterable[int]) -> int:
    """Chooses how many timesteps the next tick runs.

    Args:
        limit: The most that a tick may run.
        remaining: Steps that each lane still has to run; at least one lane.
        exact: Those of them at whose end the tick must end: where the state after a lane's last step can't be read
            from the middle of a tick.

    Returns:
        As many as `limit` allows, no more than the longest lane has, and none past the end of an exact one.
    """
    return min(limit, max(remaining), *exact)
