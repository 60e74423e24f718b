"""Admission: bounds in timesteps, bytes, time and by caller, with the test's clock."""

import contextlib
import gc
import math
import weakref
from collections import deque

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.admission import PIECE, RATE, ROOMY, Admission, Asked, work_off

from unroll_engine.admission import (
    BYTES,
    DEADLINE,
    MARGIN,
    OVERLOADED,
    RETRY,
    STEPS,
    UNKNOWN_RETRY,
)
from unroll_engine.errors import IDENTITY_LIMIT, OverloadedError
from unroll_engine.service_rate import RATE_LIFETIME, RATE_WINDOW


def refusal(admission: Admission, job: Asked, now: float) -> OverloadedError:
    with pytest.raises(OverloadedError) as caught:
        admission.at(now).admit(job)
    return caught.value


def measured(seconds: float) -> tuple[Admission, float, float, int]:
    """Returns an admission with a rate, the time, the rate, and the timesteps admitted for a deadline in `seconds`."""
    admission = Admission(ROOMY, ROOMY, full_tick=PIECE)
    now = work_off(admission, 5)
    rate = admission.at(now).rate
    assert rate is not None
    return admission, now, rate, int(MARGIN * seconds * rate)


def test_the_queue_is_bounded_in_timesteps_and_what_is_alone_is_always_accepted() -> None:
    admission = Admission(100, ROOMY)
    large = Asked(1000)
    admission.at(0.0).admit(large)
    assert refusal(admission, Asked(1), 0.0).reason == STEPS
    admission.ends(large, 1.0, computed=True)
    first = Asked(90)
    admission.at(1.0).admit(first)
    admission.at(1.0).admit(Asked(10))
    error = refusal(admission, Asked(1), 1.0)
    assert "100 timesteps at most" in str(error)
    assert error.retry_after == UNKNOWN_RETRY
    admission.ends(first, 2.0, computed=True)
    admission.at(2.0).admit(Asked(90))


def test_the_queue_is_bounded_in_bytes() -> None:
    admission = Admission(ROOMY, 1000)
    admission.at(0.0).admit(Asked(1, bytes=999))
    admission.at(0.0).admit(Asked(1, bytes=1))
    assert refusal(admission, Asked(1, bytes=1), 0.0).reason == BYTES


def test_a_caller_has_its_quota_and_others_do_not_notice() -> None:
    admission = Admission(ROOMY, ROOMY, quota_of={"a": 10}.get)
    mine = Asked(8, owner="a")
    admission.at(0.0).admit(mine)
    refused = refusal(admission, Asked(3, owner="a"), 0.0)
    assert (refused.reason, str(refused)) == (IDENTITY_LIMIT, "a may have at most 10 timesteps queued at once")
    admission.at(0.0).admit(Asked(10**6, owner="c"))
    admission.ends(mine, 1.0, computed=True)
    # Larger than the quota, yet admitted, since its caller has nothing else queued.
    admission.at(1.0).admit(Asked(1000, owner="a"))


def test_nothing_is_refused_for_its_deadline_while_no_rate_is_known() -> None:
    admission = Admission(ROOMY, ROOMY)
    admission.at(0.0).admit(Asked(10**9))
    admission.at(0.0).admit(Asked(10**9, deadline=0.001))
    # One at a time: the duration of a single job does not show the capacity.
    admission = Admission(ROOMY, ROOMY, full_tick=PIECE)
    now = work_off(admission, 1)
    assert admission.at(now).rate is None


@pytest.mark.parametrize("queued", [5, 300])
def test_the_rate_is_what_is_done_while_there_is_enough_to_do(queued: int) -> None:
    admission = Admission(ROOMY, ROOMY, full_tick=PIECE)
    now = work_off(admission, queued)
    assert admission.at(now).rate == pytest.approx(RATE, rel=0.1)
    # Little work does not lower the rate.
    now = work_off(admission, 1, RATE / 10, now=now)
    assert admission.at(now).rate == pytest.approx(RATE, rel=0.1)
    # More work than the known rate raises it.
    now = work_off(admission, 1, RATE * 3, now=now)
    assert admission.at(now).rate == pytest.approx(3 * RATE, rel=0.1)
    # Slow work under load lowers the rate.
    now = work_off(admission, queued, RATE / 2, seconds=5, now=now)
    assert admission.at(now).rate == pytest.approx(RATE / 2, rel=0.1)
    assert admission.at(now + RATE_LIFETIME).rate is None


def test_time_without_work_does_not_count() -> None:
    admission = Admission(ROOMY, ROOMY, full_tick=PIECE)
    now = 0.0
    for _ in range(30):
        now = work_off(admission, 5, seconds=RATE_WINDOW / 3, now=now + 5)
    # After idling, the fewest queued are none, and the measured work is still right.
    now = work_off(admission, 5, now=now)
    for _ in range(30):
        now = work_off(admission, 5, RATE, seconds=RATE_WINDOW / 3, now=now + 0.1)
    assert admission.at(now).rate == pytest.approx(RATE, rel=0.1)


def test_what_can_t_be_done_in_time_is_refused_and_told_when_to_come_again() -> None:
    seconds = 2.0
    admission, now, rate, most = measured(seconds)
    admission.at(now).admit(Asked(most - 10, deadline=now + seconds))
    error = refusal(admission, Asked(11, deadline=now + seconds), now)
    assert error.reason == DEADLINE
    # By then half of the queue is done.
    assert error.retry_after == pytest.approx((most - 10) / 2 / rate, abs=0.01)
    admission.at(now).admit(Asked(10, deadline=now + seconds))
    # Callers with enough time, or without a deadline, are still admitted.
    admission.at(now).admit(Asked(10**5, deadline=now + 60))
    admission.at(now).admit(Asked(10**6))
    # Later deadlines do not cause refusals of earlier ones.
    admission.at(now).admit(Asked(10, deadline=now + seconds / 2))
    # Streams go before it.
    admission.at(now).admit(Asked(10 * most, interactive=True))
    assert refusal(admission, Asked(1, deadline=now + seconds / 2), now).reason == DEADLINE


def test_a_call_that_is_not_read_is_refused_where_it_would_be_and_only_under_overload() -> None:
    admission = Admission(1600, ROOMY, full_tick=PIECE, quota_of={"a": 10}.get)
    admission.at(0.0).check_unread("a", 0.0, False)
    admission.at(0.0).admit(Asked(10, owner="a"))
    assert admission.overloaded_until < 0.0
    with pytest.raises(OverloadedError) as caught:
        admission.at(0.0).check_unread("a", None, False)
    assert caught.value.reason == IDENTITY_LIMIT
    # One caller over its quota does not overload the server.
    assert admission.overloaded_until < 0.0
    admission.at(0.0).check_unread("b", None, False)
    admission.at(0.0).admit(Asked(1490))
    admission.at(0.0).check_unread("b", None, False)
    admission.at(0.0).admit(Asked(1))
    # The last sixteenth is reserved for messages already read.
    with pytest.raises(OverloadedError):
        admission.at(0.0).check_unread("b", None, False)
    assert admission.overloaded_until == OVERLOADED
    admission.at(0.0).admit(Asked(99))
    assert refusal(admission, Asked(1), 5.0).reason == STEPS
    assert admission.overloaded_until == 5.0 + OVERLOADED


def test_a_call_that_is_not_read_and_can_t_be_done_in_time_is_refused() -> None:
    admission = Admission(ROOMY, ROOMY, full_tick=PIECE)
    now = work_off(admission, 5)
    admission.at(now).admit(Asked(int(RATE), deadline=now + 2.5))
    admission.at(now).check_unread("", 3.0, False)
    admission.at(now + 0.6).check_unread("", None, False)
    # Before all that is queued.
    admission.at(now + 0.6).check_unread("", 0.4, False)
    with pytest.raises(OverloadedError) as caught:
        admission.at(now + 0.6).check_unread("", 1.9, False)
    assert caught.value.reason == DEADLINE


@given(
    jobs=st.lists(
        st.tuples(st.integers(1, 300_000), st.floats(0.1, 4.0) | st.just(math.inf), st.booleans()), max_size=8
    ),
    interactive=st.booleans(),
    share=st.floats(0.001, 0.999),
    max_steps=st.sampled_from([ROOMY, 400_000]),
)
def test_what_is_refused_without_being_asked_would_be(
    jobs: list[tuple[int, float, bool]], interactive: bool, share: float, max_steps: int
) -> None:
    admission = Admission(max_steps, ROOMY, full_tick=PIECE)
    now = work_off(admission, 5)
    for steps, seconds, first in jobs:
        with contextlib.suppress(OverloadedError):
            admission.at(now).admit(Asked(steps, deadline=now + seconds, interactive=first))
    for later in (now, now + 1.0):
        found = admission.at(later).refusal(interactive)
        if found is None:
            continue
        remaining = 5 * share if found.rate else None
        before = max((steps for due, steps in found.due if remaining and due <= later + remaining), default=0.0)
        room = found.rate * 5 * share - before if before else math.inf
        if found.rate and room >= 1:
            admission.at(later).check_unread("", remaining, interactive)
            continue
        with pytest.raises(OverloadedError) as caught:
            admission.at(later).check_unread("", remaining, interactive)
        assert (caught.value.reason, str(caught.value)) == (found.error.reason, str(found.error))


def test_a_refusal_is_freed_without_the_garbage_collector() -> None:
    admission = Admission(1, ROOMY)
    admission.at(0.0).admit(Asked(1))
    gc.disable()
    try:
        try:
            admission.at(0.0).admit(Asked(1))
        except OverloadedError as error:
            refused = weakref.ref(error)
        assert refused() is None
    finally:
        gc.enable()


def test_bulk_work_is_no_reason_to_refuse_what_goes_before_it() -> None:
    """Next steps of a session with a deadline are admitted beside a queue full of bulk work."""
    seconds = 2.0
    admission, now, _, most = measured(seconds)
    admission.at(now).admit(Asked(most, deadline=now + seconds))
    assert refusal(admission, Asked(1, deadline=now + seconds), now).reason == DEADLINE
    admission.at(now).check_unread("", seconds, True)
    admission.at(now).admit(Asked(most - 10, deadline=now + seconds, interactive=True))
    # Other interactive work is.
    assert refusal(admission, Asked(11, deadline=now + seconds, interactive=True), now).reason == DEADLINE
    with pytest.raises(OverloadedError):
        admission.at(now).check_unread("", seconds, True)


@pytest.mark.parametrize("timeout", [0.2, 1.0, 10.0])
def test_at_five_times_the_load_the_good_output_is_what_refusing_leaves(timeout: float) -> None:
    """Serving takes 10 ms and refusing 50 us on one core, so at best 98 % of the capacity remains."""
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
                if now < admission.overloaded_until:
                    admission.at(now).check_unread("", job.deadline - now, False)
                admission.at(now).admit(job)
            except OverloadedError:
                now += refusing
            else:
                waiting.append(job)
        elif waiting:
            job = waiting.popleft()
            # Like the engine, it does not compute expired jobs.
            computed = now < job.deadline
            now += serving if computed else 0.0
            admission.ends(job, now, computed=computed)
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
    admission = Admission(100, 150, full_tick=2, quota_of={"a": 20}.get)
    held: deque[Asked] = deque()
    now = 0.0
    for steps, size, seconds, interactive, owner, passed, leaves in events:
        now += passed
        if leaves and held:
            admission.ends(held.popleft(), now, computed=interactive)
        job = Asked(steps, size, now + seconds, interactive, owner)
        refused: OverloadedError | None = None
        try:
            admission.at(now).admit(job)
        except OverloadedError as error:
            refused = error
        else:
            held.append(job)
        assert refused is None or (held and RETRY[0] <= refused.retry_after <= RETRY[1])
        assert admission.steps == sum(job.steps for job in held)
        assert admission.bytes == sum(job.bytes for job in held)
        assert len(held) <= 1 or (admission.steps <= 100 and admission.bytes <= 150)
        rate = admission.at(now).rate
        assert rate is None or rate > 0
    for job in held:
        admission.ends(job, now, computed=False)
    # The state is the initial one, except for the rate.
    assert (admission.steps, admission.bytes) == (0, 0)
    admission.at(now).admit(Asked(1000, 1000, owner="a"))
