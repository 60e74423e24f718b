"""The scheduler alone: order, fairness, dropped work, and the length of a tick."""

from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from unroll_engine.scheduler import ALERT_SECONDS, IMPLICIT_DEADLINE, Queue, TickCost, capacity_of, tick_steps

COST = TickCost(fixed=50e-6, step=2e-6, lane=0.25e-6)


@dataclass(eq=False)
class Item:
    name: int
    size: int = 1
    interactive: bool = False
    deadline: float = float("inf")
    cancelled: bool = False
    taken: int = 0
    arrived: float = 0.0


@dataclass
class Waiting:
    """A queue, what it dropped, and a clock."""

    lanes: int = 4
    dropped: list[tuple[int, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.queue: Queue[Item] = Queue(self.lanes, lambda item, cause: self.dropped.append((item.name, cause)))

    def take(self, now: float = 0.0, interactive: int = 0, bulk: int = 0) -> list[tuple[int, int]]:
        """Returns name and index of each sequence taken."""
        return [
            (job.name, index)
            for job, first, number in self.queue.take(now, interactive, bulk)
            for index in range(first, first + number)
        ]

    def take_all(self, now: float = 0.0) -> list[tuple[int, int]]:
        taken = []
        while self.queue.waiting:
            taken += self.take(now)
        return taken


@given(st.lists(st.integers(1, 9), max_size=10), st.integers(1, 7))
def test_work_without_deadlines_is_taken_in_order_of_arrival_each_sequence_once(sizes: list[int], lanes: int) -> None:
    waiting = Waiting(lanes)
    for name, size in enumerate(sizes):
        waiting.queue.add(Item(name, size), 0.0)
    assert waiting.take_all() == [(name, index) for name, size in enumerate(sizes) for index in range(size)]


@given(st.lists(st.tuples(st.floats(1, 100), st.floats(0, 50)), max_size=12))
def test_the_earliest_deadline_goes_first_and_none_counts_as_patience(job: list[tuple[float, float]]) -> None:
    waiting = Waiting(lanes=1)
    for name, (deadline, now) in enumerate(job):
        waiting.queue.add(Item(name, deadline=np.inf if deadline > 90 else deadline + 60), now)
    expected = sorted(
        range(len(job)),
        key=lambda name: (
            min(np.inf if job[name][0] > 90 else job[name][0] + 60, job[name][1] + IMPLICIT_DEADLINE),
            name,
        ),
    )
    assert [name for name, _ in waiting.take_all()] == expected


def test_streams_go_before_bulk_that_came_first() -> None:
    waiting = Waiting(lanes=2)
    waiting.queue.add(Item(0, 8), 0.0)
    waiting.queue.add(Item(1, interactive=True), 0.0)
    assert waiting.take() == [(1, 0), (0, 0), (0, 1)]


@given(
    lanes=st.integers(1, 100),
    interactive=st.integers(0, 300),
    bulk=st.integers(0, 300),
)
def test_neither_class_takes_the_lanes_that_are_the_other_s(lanes: int, interactive: int, bulk: int) -> None:
    waiting = Waiting(lanes)
    for name in range(interactive):
        waiting.queue.add(Item(name, interactive=True), 0.0)
    if bulk:
        waiting.queue.add(Item(-1, bulk), 0.0)
    taken = waiting.take()
    streams = sum(name >= 0 for name, _ in taken)
    others = len(taken) - streams
    spare = capacity_of(lanes) - lanes
    assert spare >= 1
    assert len(taken) <= capacity_of(lanes)
    assert streams == min(interactive, lanes)
    assert others >= min(bulk, spare)
    # With all of one class in flight, the other still finds lanes.
    assert len(waiting.take(interactive=lanes, bulk=0)) == min(spare, bulk - others)
    assert len(waiting.take(interactive=0, bulk=lanes)) == min(spare, interactive - streams)


@given(st.lists(st.tuples(st.integers(1, 4), st.booleans(), st.booleans(), st.booleans()), max_size=12))
def test_cancelled_and_expired_work_is_dropped_with_its_cause_and_the_rest_all_taken(
    kinds: list[tuple[int, bool, bool, bool]],
) -> None:
    waiting = Waiting()
    items = [
        Item(name, size, interactive, deadline=1.0 if late else 9.0, cancelled=cancelled)
        for name, (size, interactive, cancelled, late) in enumerate(kinds)
    ]
    for item in items:
        waiting.queue.add(item, 0.0)
    taken = waiting.take_all(now=2.0)
    good = {item.name for item in items if not item.cancelled and item.deadline > 2}
    assert sorted(taken) == [(item.name, index) for item in items if item.name in good for index in range(item.size)]
    causes = {item.name: "cancelled" if item.cancelled else "expired" for item in items if item.name not in good}
    assert dict(waiting.dropped) == causes
    assert len(waiting.dropped) == len(causes)


def test_work_cancelled_half_way_gives_no_more_sequences() -> None:
    waiting = Waiting()
    job = Item(0, 10)
    waiting.queue.add(job, 0.0)
    assert len(waiting.take()) == 4
    job.cancelled = True
    assert waiting.take() == []
    assert not waiting.queue.waiting


def test_cancelled_work_far_back_in_the_queue_does_not_pile_up() -> None:
    waiting = Waiting()
    waiting.queue.add(Item(-1), 0.0)
    for name in range(10_000):
        item = Item(name)
        waiting.queue.add(item, 0.0)
        item.cancelled = True
        waiting.queue.cancel()
        assert waiting.queue.waiting < 200
    assert waiting.take() == [(-1, 0)]
    assert len(waiting.dropped) + waiting.queue.waiting == 10_000


REMAINING = st.lists(st.integers(1, 50), min_size=1, max_size=80)


@given(st.integers(1, 40), REMAINING, st.booleans(), st.booleans(), st.booleans())
def test_a_tick_passes_no_end_that_it_must_not(
    limit: int, lanes: list[int], with_interactive: bool, with_exact: bool, alert: bool
) -> None:
    interactive = min(lanes) if with_interactive else None
    exact = min(lanes[: len(lanes) // 2 + 1]) if with_exact else None
    steps = tick_steps(limit, COST, np.array(lanes), interactive=interactive, exact=exact, alert=alert)
    assert 1 <= steps <= min(limit, max(lanes), interactive or limit, exact or limit)
    assert not alert or steps == 1 or COST.seconds(len(lanes), steps) <= ALERT_SECONDS


@given(REMAINING, st.integers(1, 32))
def test_no_other_length_that_is_weighed_has_more_real_steps_a_second(lanes: list[int], limit: int) -> None:
    remaining = np.array(lanes)

    def rate(steps: int) -> float:
        return float(np.minimum(remaining, steps).sum()) / COST.seconds(len(lanes), steps)

    chosen = tick_steps(limit, COST, remaining, interactive=None, exact=None, alert=False)
    for other in (1, 2, 4, 8, 16, 32, min(limit, max(lanes))):
        assert other > limit or other > max(lanes) or rate(chosen) >= rate(other) * (1 - 1e-12)


@pytest.mark.parametrize("alert", [False, True])
def test_a_stream_s_single_step_is_run_alone_and_bulk_in_long_ticks(alert: bool) -> None:
    bulk = np.full(64, 1000)
    assert tick_steps(32, COST, np.append(bulk, 1), interactive=1, exact=None, alert=True) == 1
    steps = tick_steps(32, COST, bulk, interactive=None, exact=None, alert=alert)
    assert steps == (11 if alert else 32)


def test_where_ticks_are_costly_alert_ones_still_do_more_than_that() -> None:
    slow = TickCost(fixed=1e-3, step=10e-6, lane=1e-6)
    steps = tick_steps(32, slow, np.full(64, 1000), interactive=None, exact=None, alert=True)
    assert steps == 13
    assert slow.seconds(64, steps) <= 2 * slow.fixed
