"""The scheduler alone: order, fairness, dropped work, and the length of a tick."""

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from unroll_server.scheduler import BULK_TURN, Queue, tick_steps


@dataclass(eq=False)
class Item:
    name: int
    size: int
    interactive: bool
    cancelled: bool = False


def take_all(queue: Queue[Item], free: int) -> list[tuple[int, int]]:
    taken: list[tuple[int, int]] = []
    while queue:
        taken += [(work.name, index) for work, index in queue.take(free)]
    return taken


@given(st.lists(st.integers(1, 5), max_size=10), st.integers(1, 7))
def test_one_class_is_taken_in_order_of_arrival_each_sequence_once(sizes: list[int], free: int) -> None:
    queue: Queue[Item] = Queue()
    for name, size in enumerate(sizes):
        queue.add(Item(name, size, interactive=False))
    assert take_all(queue, free) == [(name, index) for name, size in enumerate(sizes) for index in range(size)]


def test_interactive_work_goes_before_bulk_that_came_first() -> None:
    queue: Queue[Item] = Queue()
    queue.add(Item(0, 8, interactive=False))
    queue.add(Item(1, 1, interactive=True))
    assert [work.name for work, _ in queue.take(1)] == [1]


def test_bulk_gets_its_turn_while_interactive_work_never_ends() -> None:
    queue: Queue[Item] = Queue()
    queue.add(Item(0, 100, interactive=False))
    names = []
    for name in range(1, 41):
        queue.add(Item(name, 1, interactive=True))
        queue.add(Item(name, 1, interactive=True))
        names += [work.name for work, _ in queue.take(1)]
    assert names.count(0) == len(names) // BULK_TURN


@given(st.lists(st.tuples(st.integers(1, 4), st.booleans(), st.booleans()), max_size=12), st.integers(1, 5))
def test_cancelled_work_is_never_taken_and_the_rest_all_is(kinds: list[tuple[int, bool, bool]], free: int) -> None:
    queue: Queue[Item] = Queue()
    items = [Item(name, *kind) for name, kind in enumerate(kinds)]
    for item in items:
        queue.add(item)
    expected = {(item.name, index) for item in items if not item.cancelled for index in range(item.size)}
    taken = take_all(queue, free)
    assert set(taken) == expected
    assert len(taken) == len(expected)


def test_work_cancelled_half_way_gives_no_more_sequences() -> None:
    queue: Queue[Item] = Queue()
    work = Item(0, 10, interactive=False)
    queue.add(work)
    assert len(queue.take(4)) == 4
    work.cancelled = True
    assert queue.take(4) == []
    assert not queue


@given(st.integers(1, 32), st.lists(st.tuples(st.integers(1, 50), st.booleans()), min_size=1, max_size=8))
def test_a_tick_passes_no_exact_end_and_is_as_long_as_it_may(limit: int, lanes: list[tuple[int, bool]]) -> None:
    remaining = [steps for steps, _ in lanes]
    exact = [steps for steps, is_exact in lanes if is_exact]
    steps = tick_steps(limit, remaining, exact)
    assert 1 <= steps <= limit
    assert steps <= max(remaining)
    assert all(steps <= end for end in exact)
    longer = steps + 1
    assert longer > limit or longer > max(remaining) or any(longer > end for end in exact)
