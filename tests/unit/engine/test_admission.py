"""What may be queued: bounds in timesteps, bytes, time and by caller; the clock is the test's."""

import math
from collections import deque
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from unroll_engine.admission import (
    BYTES,
    DEADLINE,
    IDENTITY,
    MARGIN,
    RETRY,
    STEPS,
    STRAIN,
    UNKNOWN_RETRY,
    Admission,
    Share,
)
from unroll_engine.errors import OverloadedError
from unroll_engine.rate import BELIEF, WINDOW

ROOMY = 10**12
RATE = 100_000.0
PIECE = 100


@dataclass
class Asked:
    steps: int
    bytes: int = 1
    deadline: float = math.inf
    interactive: bool = False
    owner: str = ""
    due: int = 0


def refusal(admission: Admission, job: Asked, now: float) -> OverloadedError:
    with pytest.raises(OverloadedError) as caught:
        admission.admit(job, now)
    return caught.value


def measured(seconds: float) -> tuple[Admission, float, float, int]:
    """Admission with a measured rate, the clock, that rate, and the timesteps it admits for a deadline in `seconds`."""
    admission = Admission(ROOMY, ROOMY, full_tick=PIECE)
    now = work_off(admission, 5)
    rate = admission.rate(now)
    assert rate is not None
    return admission, now, rate, int(MARGIN * seconds * rate)


def work_off(admission: Admission, queued: int, rate: float = RATE, seconds: float = 1.0, now: float = 100.0) -> float:
    """Keeps `queued` pieces of work queued, and has `rate` timesteps a second done; then all is done at once.

    Returns:
        The time afterwards.
    """
    waiting: deque[Asked] = deque()
    for _ in range(int(seconds * rate / PIECE)):
        while len(waiting) < queued:
            waiting.append(Asked(PIECE))
            admission.admit(waiting[-1], now)
        now += PIECE / rate
        admission.release(waiting.popleft(), now, computed=True)
    for job in waiting:
        admission.release(job, now, computed=False)
    return now


def test_the_queue_is_bounded_in_timesteps_and_what_is_alone_is_always_accepted() -> None:
    admission = Admission(100, ROOMY)
    large = Asked(1000)
    admission.admit(large, 0.0)
    assert refusal(admission, Asked(1), 0.0).reason == STEPS
    admission.release(large, 1.0, computed=True)
    first = Asked(90)
    admission.admit(first, 1.0)
    admission.admit(Asked(10), 1.0)
    error = refusal(admission, Asked(1), 1.0)
    assert "100 timesteps at most" in str(error)
    assert error.retry_after == UNKNOWN_RETRY
    admission.release(first, 2.0, computed=True)
    admission.admit(Asked(90), 2.0)


def test_the_queue_is_bounded_in_bytes() -> None:
    admission = Admission(ROOMY, 1000)
    admission.admit(Asked(1, bytes=999), 0.0)
    admission.admit(Asked(1, bytes=1), 0.0)
    assert refusal(admission, Asked(1, bytes=1), 0.0).reason == BYTES


def test_a_caller_has_its_share_and_others_do_not_notice() -> None:
    shares = {"a": Share(steps=10), "b": Share(bytes=50)}
    admission = Admission(ROOMY, ROOMY, limits_of=shares.get)
    mine = Asked(8, owner="a")
    admission.admit(mine, 0.0)
    assert refusal(admission, Asked(3, owner="a"), 0.0).reason == IDENTITY
    admission.admit(Asked(10**6, owner="c"), 0.0)
    admission.admit(Asked(1, bytes=50, owner="b"), 0.0)
    assert refusal(admission, Asked(1, bytes=1, owner="b"), 0.0).reason == IDENTITY
    admission.release(mine, 1.0, computed=True)
    # Larger than the share, yet it can be answered at all: when its caller has nothing else.
    admission.admit(Asked(1000, owner="a"), 1.0)


def test_nothing_is_refused_for_its_deadline_while_no_rate_is_known() -> None:
    admission = Admission(ROOMY, ROOMY)
    admission.admit(Asked(10**9), 0.0)
    admission.admit(Asked(10**9, deadline=0.001), 0.0)
    # One at a time, nothing beside it: how long that takes says nothing of how much can be done.
    admission = Admission(ROOMY, ROOMY, full_tick=PIECE)
    now = work_off(admission, 1)
    assert admission.rate(now) is None


@pytest.mark.parametrize("queued", [5, 300])
def test_the_rate_is_what_is_done_while_there_is_enough_to_do(queued: int) -> None:
    admission = Admission(ROOMY, ROOMY, full_tick=PIECE)
    now = work_off(admission, queued)
    assert admission.rate(now) == pytest.approx(RATE, rel=0.1)
    # Little to do is no sign of a lower rate.
    now = work_off(admission, 1, RATE / 10, now=now)
    assert admission.rate(now) == pytest.approx(RATE, rel=0.1)
    # More done than was thought possible is one of a higher.
    now = work_off(admission, 1, RATE * 3, now=now)
    assert admission.rate(now) == pytest.approx(3 * RATE, rel=0.1)
    # Much to do, and slow: it is slower now.
    now = work_off(admission, queued, RATE / 2, seconds=5, now=now)
    assert admission.rate(now) == pytest.approx(RATE / 2, rel=0.1)
    assert admission.rate(now + BELIEF) is None


def test_time_without_work_does_not_count() -> None:
    admission = Admission(ROOMY, ROOMY, full_tick=PIECE)
    now = 0.0
    for _ in range(30):
        now = work_off(admission, 5, seconds=WINDOW / 3, now=now + 5)
    # As it idles, the fewest queued are none; what it does meanwhile is right all the same.
    now = work_off(admission, 5, now=now)
    for _ in range(30):
        now = work_off(admission, 5, RATE, seconds=WINDOW / 3, now=now + 0.1)
    assert admission.rate(now) == pytest.approx(RATE, rel=0.1)


def test_what_can_t_be_done_in_time_is_refused_and_told_when_to_come_again() -> None:
    seconds = 2.0
    admission, now, rate, most = measured(seconds)
    admission.admit(Asked(most - 10, deadline=now + seconds), now)
    error = refusal(admission, Asked(11, deadline=now + seconds), now)
    assert error.reason == DEADLINE
    # By then half of it is done.
    assert error.retry_after == pytest.approx((most - 10) / 2 / rate, abs=0.01)
    admission.admit(Asked(10, deadline=now + seconds), now)
    # Those who have time, and those who have said nothing of it, are still welcome.
    admission.admit(Asked(10**5, deadline=now + 60), now)
    admission.admit(Asked(10**6), now)
    # What comes later, by its deadline, is no reason to refuse what comes before it.
    admission.admit(Asked(10, deadline=now + seconds / 2), now)
    # Streams go before it.
    admission.admit(Asked(10 * most, interactive=True), now)
    assert refusal(admission, Asked(1, deadline=now + seconds / 2), now).reason == DEADLINE


def test_a_call_that_is_not_read_is_refused_where_it_would_be_and_only_under_strain() -> None:
    admission = Admission(1600, ROOMY, full_tick=PIECE, limits_of={"a": Share(steps=10)}.get)
    admission.check_unread("a", 0.0, 0.0)
    admission.admit(Asked(10, owner="a"), 0.0)
    assert not admission.strained(0.0)
    with pytest.raises(OverloadedError) as caught:
        admission.check_unread("a", math.inf, 0.0)
    assert caught.value.reason == IDENTITY
    # What one caller has too much of is no strain for all.
    assert not admission.strained(0.0)
    admission.check_unread("b", math.inf, 0.0)
    admission.admit(Asked(1490), 0.0)
    admission.check_unread("b", math.inf, 0.0)
    admission.admit(Asked(1), 0.0)
    # The last sixteenth is for what has been read.
    with pytest.raises(OverloadedError):
        admission.check_unread("b", math.inf, 0.0)
    assert admission.strained(0.0)
    assert not admission.strained(STRAIN)
    admission.admit(Asked(99), 0.0)
    assert refusal(admission, Asked(1), 5.0).reason == STEPS
    assert admission.strained(5.0)


def test_a_call_that_is_not_read_and_can_t_be_done_in_time_is_refused() -> None:
    admission = Admission(ROOMY, ROOMY, full_tick=PIECE)
    now = work_off(admission, 5)
    admission.admit(Asked(int(RATE), deadline=now + 2.5), now)
    admission.check_unread("", now + 2.5, now)
    admission.check_unread("", math.inf, now + 0.6)
    # Before all that is queued.
    admission.check_unread("", now + 1.0, now + 0.6)
    with pytest.raises(OverloadedError) as caught:
        admission.check_unread("", now + 2.5, now + 0.6)
    assert caught.value.reason == DEADLINE


def test_bulk_work_is_no_reason_to_refuse_what_goes_before_it() -> None:
    """As the next steps of a session, whose call has a deadline, beside as much bulk work as can be done in time."""
    seconds = 2.0
    admission, now, _, most = measured(seconds)
    admission.admit(Asked(most, deadline=now + seconds), now)
    assert refusal(admission, Asked(1, deadline=now + seconds), now).reason == DEADLINE
    assert admission.horizon(now, interactive=True) == 0
    admission.check_unread("", now + seconds, now, interactive=True)
    admission.admit(Asked(most - 10, deadline=now + seconds, interactive=True), now)
    # Others of its own kind are.
    assert admission.horizon(now, interactive=True) == pytest.approx(seconds, rel=0.1)
    assert refusal(admission, Asked(11, deadline=now + seconds, interactive=True), now).reason == DEADLINE
    with pytest.raises(OverloadedError):
        admission.check_unread("", now + seconds, now, interactive=True)


@pytest.mark.parametrize("timeout", [0.2, 1.0, 10.0])
def test_at_five_times_the_load_the_good_output_is_what_refusing_leaves(timeout: float) -> None:
    """One core, a queue in order of arrival; to serve takes 10 ms, to refuse 50 us: 98 % can be left, at best."""
    serving, refusing, seconds = 0.01, 50e-6, 8.0
    admission = Admission(ROOMY, ROOMY, full_tick=1000)
    arrivals = iter(np.cumsum(np.random.default_rng(0).exponential(serving / 5, int(8 * seconds / serving))).tolist())
    waiting: deque[Asked] = deque()
    now, good, late = 0.0, 0, 0
    arrival = next(arrivals)
    while now < seconds:
        if arrival <= now:
            job = Asked(1000, deadline=arrival + timeout)
            arrival = next(arrivals)
            try:
                if admission.strained(now):
                    admission.check_unread("", job.deadline, now)
                admission.admit(job, now)
            except OverloadedError:
                now += refusing
            else:
                waiting.append(job)
        elif waiting:
            job = waiting.popleft()
            # As the engine does: what has expired is not computed.
            computed = now < job.deadline
            now += serving if computed else 0.0
            admission.release(job, now, computed=computed)
            good += computed and now <= job.deadline
            late += computed and now > job.deadline
        else:
            now = arrival
    assert good * serving / seconds >= 0.9
    assert late <= 0.02 * good


@given(
    st.lists(
        st.tuples(
            st.integers(1, 60),
            st.integers(0, 60),
            st.floats(0.0, 5.0) | st.just(math.inf),
            st.booleans(),
            st.sampled_from("abc"),
            st.floats(0.0, 0.2),
            st.booleans(),
        ),
        max_size=60,
    )
)
def test_the_books_balance_whatever_comes_and_goes(
    events: list[tuple[int, int, float, bool, str, float, bool]],
) -> None:
    admission = Admission(100, 150, full_tick=2, limits_of={"a": Share(20, 50)}.get)
    held: deque[Asked] = deque()
    now = 0.0
    for steps, size, seconds, interactive, owner, passed, leaves in events:
        now += passed
        if leaves and held:
            admission.release(held.popleft(), now, computed=interactive)
        job = Asked(steps, size, now + seconds, interactive, owner)
        refused: OverloadedError | None = None
        try:
            admission.admit(job, now)
        except OverloadedError as error:
            refused = error
        else:
            held.append(job)
        assert refused is None or (held and RETRY[0] <= refused.retry_after <= RETRY[1])
        assert admission.steps == sum(job.steps for job in held)
        assert admission.bytes == sum(job.bytes for job in held)
        assert len(held) <= 1 or (admission.steps <= 100 and admission.bytes <= 150)
        rate = admission.rate(now)
        assert rate is None or rate > 0
    for job in held:
        admission.release(job, now, computed=False)
    # As if nothing had been: what is left is the rate.
    assert (admission.steps, admission.bytes) == (0, 0)
    admission.admit(Asked(1000, 1000, owner="a"), now)
