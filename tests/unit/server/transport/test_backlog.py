"""Calls that wait for a busy engine: each begins once, by deadline, or ends and is counted."""

from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.admission import PIECE, RATE, ROOMY, Admission, Asked, work_off

pytest.importorskip("unroll_server.transport.native._http2", reason="the native transport is not compiled")
from support.native_peer import UNARY, WORK, Peer  # needs it
from support.raw_http2 import RST_STREAM, frame

from unroll_server.transport.native import _http2
from unroll_server.transport.native.backlog import Backlog
from unroll_server.transport.registry import ComposedMethod, Work

CANCELLED, DEADLINE_EXCEEDED = 1, 4
CANCEL = (8).to_bytes(4, "big")
LATER = ("grpc-timeout", "30S")


class Counts:
    """Counts calls that ended while they waited, by status."""

    def __init__(self) -> None:
        self.ended: Counter[int] = Counter()

    def refused(self, code: int, count: int) -> None:
        self.ended[code] += count


class Place:
    """A backlog before an engine of known rate, and a caller."""

    def __init__(self, *, known: bool = True) -> None:
        self.admission = Admission(ROOMY, ROOMY, full_tick=PIECE)
        self.peer = Peer()
        if known:
            self.peer.now = work_off(self.admission, 5)
        self.counts = Counts()
        self.begun: list[tuple[bytes, float]] = []
        self.running: list[_http2.Call] = []
        counts: Any = self.counts
        bulk = ComposedMethod(None, None, Work(interactive=False, step_mark=b"step"), counts, is_plain=True)
        self.backlog = Backlog(self.admission, {self.peer.methods[WORK]: bulk}, self.begin)
        self.stream = -1

    def begin(self, call: _http2.Call, message: bytes, waited: float = 0.0) -> None:
        """Begins a call, which ends with `answer`."""
        self.begun.append((message, waited))
        self.running.append(call)
        call.context = None

    def answer(self) -> None:
        """Answers the calls that have begun."""
        for call in self.running:
            call.finish(0, "", ())
            self.backlog.ended()
        self.running.clear()

    def call(self, body: bytes, timeout: tuple[str, str] = LATER, path: str = WORK) -> int:
        self.stream += 2
        self.peer.call(self.stream, body, path, timeout)
        return self.stream

    def turn(self, seconds: float = 0.0) -> None:
        """Does what the transport does in a turn of the event loop."""
        self.peer.now += seconds
        self.admission.at(self.peer.now)
        self.peer.server.expire(self.peer.now)
        self.backlog.begin(self.peer.now)
        for kind, call, message in self.peer.events():
            if kind == _http2.REQUEST:
                if not self.backlog.add(call, message, self.peer.now):
                    self.begin(call, message)
            elif kind == _http2.ABORTED and (context := getattr(call, "context", None)) is not None:
                context.abandon()

    def fill(self) -> int:
        """Makes calls until the engine is busy, and returns their number."""
        while len(self.begun) == len(self.running) and self.admission.steps == 0:
            self.call(b"fills")
            self.turn()
        # The last one waits.
        self.peer.send(frame(RST_STREAM, 0, self.stream, CANCEL))
        self.turn()
        self.counts.ended.clear()
        return len(self.begun)


def test_calls_wait_while_the_engine_has_enough_work_and_begin_by_deadline() -> None:
    place = Place()
    busy = place.fill()
    # 10 ms of work, in jobs of the usual size.
    assert busy == pytest.approx(RATE / 100 / PIECE, abs=1)
    for body, timeout in ((b"last", "9S"), (b"first", "3S"), (b"second", "6S")):
        place.call(body, ("grpc-timeout", timeout))
    place.turn()
    assert len(place.begun) == busy
    assert place.admission.steps == pytest.approx(3 * PIECE, abs=3)  # they count as queued
    place.answer()
    place.turn(0.25)
    assert place.begun[busy:] == [(b"first", 0.25), (b"second", 0.25), (b"last", 0.25)]
    assert (place.admission.steps, place.admission.bytes) == (0, 0)


def test_as_many_begin_as_end() -> None:
    place = Place()
    busy = place.fill()
    for index in range(50):
        place.call(bytes([index]))
        place.turn()
    for turns in (1, 2, 3):
        place.answer()
        place.turn()
        assert len(place.begun) == busy + turns * busy


def test_work_of_other_kinds_lets_no_call_wait() -> None:
    place = Place()
    place.admission.at(place.peer.now).admit(Asked(int(RATE)))
    place.call(b"now")
    place.turn()
    assert place.begun == [(b"now", 0.0)]


@pytest.mark.parametrize(("body", "path"), [(b"other", UNARY), (b"parameters: step", WORK)])
def test_calls_that_give_no_bulk_work_never_wait(body: bytes, path: str) -> None:
    place = Place()
    busy = place.fill()
    place.call(body, path=path)
    place.turn()
    assert place.begun[busy:] == [(body, 0.0)]


def test_no_call_waits_while_the_rate_is_not_known() -> None:
    place = Place(known=False)
    for index in range(90):
        place.call(bytes([index]))
    place.turn()
    assert len(place.begun) == 90


def test_a_waiting_call_that_ends_is_counted_with_its_status_and_never_begins() -> None:
    place = Place()
    busy = place.fill()
    place.call(b"late", ("grpc-timeout", "1S"))
    late = place.stream
    left = place.call(b"left")
    place.call(b"stays")
    place.turn()
    place.peer.send(frame(RST_STREAM, 0, left, CANCEL))
    place.answer()
    place.turn(2.0)
    place.turn()
    assert place.counts.ended == {CANCELLED: 1, DEADLINE_EXCEEDED: 1}
    assert [body for body, _ in place.begun[busy:]] == [b"stays"]
    assert place.peer.answer(late).status == (str(DEADLINE_EXCEEDED), "Deadline Exceeded")
    assert (place.admission.steps, place.admission.bytes) == (0, 0)


@given(st.lists(st.sampled_from(["call", "call", "call", "leave", "answer"]), max_size=90), st.randoms())
def test_each_call_begins_once_or_ends_once(actions: list[str], random: Any) -> None:
    place = Place()
    streams: list[int] = []
    for action in actions:
        if action == "call":
            streams.append(place.call(bytes([len(streams)]), ("grpc-timeout", f"{random.randint(1, 60)}S")))
        elif action == "leave" and streams:
            # Perhaps one that has begun.
            place.peer.send(frame(RST_STREAM, 0, random.choice(streams), CANCEL))
        elif action == "answer":
            place.answer()
        if random.random() < 0.7:
            place.turn(random.choice((0.0, 0.5)))
    for _ in range(len(streams) + 1):
        place.turn()
        place.answer()
    bodies = [body for body, _ in place.begun]
    assert len(bodies) == len(set(bodies))
    assert len(bodies) + sum(place.counts.ended.values()) == len(streams)
    assert (place.admission.steps, place.admission.bytes) == (0, 0)
