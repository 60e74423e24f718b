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
        bulk: Any = {self.peer.methods[WORK]: self.counts}
        self.backlog = Backlog(self.admission, bulk, self.begin)
        self.stream = -1

    def begin(self, call: _http2.Call, message: bytes, waited: float = 0.0) -> None:
        """Answers a call at once."""
        self.begun.append((message, waited))
        call.context = None
        call.finish(0, "", ())

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

    def keep_busy(self) -> list[Asked]:
        """Queues a second of work."""
        jobs = [Asked(PIECE) for _ in range(int(RATE / PIECE))]
        for job in jobs:
            self.admission.at(self.peer.now).admit(job)
        return jobs

    def finish(self, jobs: list[Asked]) -> None:
        """Computes queued work."""
        while jobs:
            self.admission.ends(jobs.pop(), self.peer.now, computed=True)


def test_calls_wait_while_the_engine_has_enough_work_and_begin_by_deadline() -> None:
    place = Place()
    busy = place.keep_busy()
    for body, timeout in ((b"last", "9S"), (b"first", "3S"), (b"second", "6S")):
        place.call(body, ("grpc-timeout", timeout))
    place.turn()
    assert place.begun == []
    assert place.admission.steps > len(busy) * PIECE  # they count as queued
    place.finish(busy)
    place.turn(0.25)
    assert place.begun == [(b"first", 0.25), (b"second", 0.25), (b"last", 0.25)]
    assert (place.admission.steps, place.admission.bytes) == (0, 0)


def test_no_more_begin_than_keep_the_engine_busy() -> None:
    place = Place()
    busy = place.keep_busy()
    for index in range(100):
        place.call(bytes([index]))
        place.turn()
    place.finish(busy)
    place.turn()
    begun = len(place.begun)
    assert 0 < begun < 50
    # The jobs of this test's calls are over at once, so each turn begins as many.
    place.turn()
    assert len(place.begun) == 2 * begun


@pytest.mark.parametrize(("known", "path"), [(False, WORK), (True, UNARY)])
def test_calls_do_not_wait_for_an_engine_of_unknown_rate_or_for_none(known: bool, path: str) -> None:
    place = Place(known=known)
    place.keep_busy()
    place.call(b"now", path=path)
    place.turn()
    assert place.begun == [(b"now", 0.0)]


def test_a_waiting_call_that_ends_is_counted_with_its_status_and_never_begins() -> None:
    place = Place()
    busy = place.keep_busy()
    place.call(b"late", ("grpc-timeout", "1S"))
    left = place.call(b"left")
    place.call(b"stays")
    place.turn()
    place.peer.send(frame(RST_STREAM, 0, left, CANCEL))
    place.finish(busy)
    place.turn(2.0)
    assert place.counts.ended == {CANCELLED: 1, DEADLINE_EXCEEDED: 1}
    assert [body for body, _ in place.begun] == [b"stays"]
    assert place.peer.answer(1).status == (str(DEADLINE_EXCEEDED), "Deadline Exceeded")
    assert (place.admission.steps, place.admission.bytes) == (0, 0)


@given(st.lists(st.sampled_from(["call", "call", "leave", "turn", "idle"]), max_size=90), st.randoms())
def test_each_call_begins_once_or_ends_once(actions: list[str], random: Any) -> None:
    place = Place()
    busy = place.keep_busy()
    streams: list[int] = []
    for action in actions:
        if action == "call":
            streams.append(place.call(bytes([len(streams)]), ("grpc-timeout", f"{random.randint(1, 60)}S")))
        elif action == "leave" and streams:
            # Perhaps one that has begun, and so is answered.
            place.peer.send(frame(RST_STREAM, 0, random.choice(streams), CANCEL))
        elif action == "idle":
            place.finish(busy)
        place.turn(random.choice((0.0, 0.5)))
    place.finish(busy)
    for _ in streams:
        place.turn()
    bodies = [body for body, _ in place.begun]
    assert len(bodies) == len(set(bodies))
    assert len(bodies) + sum(place.counts.ended.values()) == len(streams)
    assert (place.admission.steps, place.admission.bytes) == (0, 0)
