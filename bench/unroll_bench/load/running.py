"""Unary calls in flight: places that are used for one call after another, and their counters."""

import asyncio
import gc
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from time import perf_counter

from unroll_bench.load.calls import Request, Stream
from unroll_bench.load.frames import OK
from unroll_bench.load.pool import Peer, Pool
from unroll_bench.load.result import Call, Result, Tally

PATIENCE = 10.0
"""Seconds for which a run waits for answers at its end; missing ones are the error "unanswered"."""


class _Caller(Stream):
    """A place of a call in flight, used for one call after another."""

    __slots__ = ("answer", "index", "line", "run", "started", "surplus")

    def __init__(self, run: "ClosedRun | OpenRun", line: int) -> None:
        super().__init__()
        self.run = run
        self.line = line
        self.index = 0
        self.started = 0.0
        self.answer: bytes | None = None
        self.surplus = False

    def message(self, data: bytes, now: float) -> None:
        self.surplus = self.answer is not None
        self.answer = data

    def ended(self, status: str, now: float) -> None:
        run = self.run
        if run.closed:  # these calls are counted already
            return
        tally = run.tally
        tally.in_flight -= 1
        answer = self.answer
        if status == OK and answer is not None and not self.surplus:
            check = run.calls[self.index].check
            try:
                tally.wrong += check is not None and not check(answer)
            except Exception as error:
                tally.errors[f"the check failed: {error!r}"] += 1
            run.measure(self.started, now)
        else:
            tally.errors["INTERNAL: not one message in the answer" if status == OK else status] += 1
        self.answer = None
        self.surplus = False
        run.free(self)


class _Run:
    """Base of both loops: connections, calls and the clock of the window."""

    def __init__(
        self, address: str | Peer, calls: Sequence[Call], connections: int, tally: Tally | None, seconds: float
    ) -> None:
        if not calls:
            raise ValueError("calls: one or more expected")
        if connections < 1 or seconds <= 0:
            raise ValueError("connections, seconds: more than 0 expected")
        peer = address if isinstance(address, Peer) else Peer(address)
        headers = {path: peer.headers(path) for path in {call.path for call in calls}}
        self.calls = calls
        self.requests = [Request(headers[call.path], call.message) for call in calls]
        self.tally = tally or Tally()
        self.pool = Pool(peer, connections, self.tally, self.resume)
        self.over = False
        self.closed = False
        self.parked: list[list[_Caller]] = [[] for _ in range(connections)]
        self._next = 0
        self.idle = asyncio.Event()

    def begin(self, caller: _Caller, started: float) -> None:
        """Starts the next call, or waits for its connection if that is being replaced."""
        caller.started = started
        index = self._next
        caller.index = index
        self._next = index + 1 if index + 1 < len(self.calls) else 0
        self.tally.in_flight += 1
        self._send(caller)

    def resume(self, line: int) -> None:
        """Starts the calls that waited for a connection."""
        parked, self.parked[line] = self.parked[line], []
        for caller in parked:
            self._send(caller)

    def _send(self, caller: _Caller) -> None:
        connection = self.pool.lines[caller.line]
        if connection.usable:
            connection.call(caller, self.requests[caller.index])
        else:
            self.parked[caller.line].append(caller)

    async def finish(self) -> None:
        """Waits a while for calls in flight; counts the missing ones."""
        self.over = True
        if self.tally.in_flight:
            self.idle.clear()
            try:
                async with asyncio.timeout(PATIENCE):
                    await self.idle.wait()
            except TimeoutError:
                self.tally.errors["unanswered"] += self.tally.in_flight

    async def close(self) -> None:
        """Ends all connections."""
        self.over = True
        self.closed = True
        await self.pool.close()

    def result(self, seconds: float) -> Result:
        """Returns the result of the run."""
        return self.tally.result(seconds)


class ClosedRun(_Run):
    """A fixed number of calls in flight."""

    def add(self, line: int) -> None:
        """Starts one more call."""
        self.begin(_Caller(self, line), perf_counter())

    def measure(self, started: float, now: float) -> None:
        """Counts an answer."""
        if self.tally.begin <= now < self.tally.end:
            self.tally.latencies.append(now - started)

    def free(self, caller: _Caller) -> None:
        """Uses a place whose call has ended."""
        if not self.over:
            self.begin(caller, perf_counter())
        elif not self.tally.in_flight:
            self.idle.set()


class OpenRun(_Run):
    """Calls at given moments; `arrive` starts them."""

    def __init__(
        self,
        address: str | Peer,
        calls: Sequence[Call],
        connections: int,
        tally: Tally | None,
        seconds: float,
        max_in_flight: int,
        most_late: float,
    ) -> None:
        super().__init__(address, calls, connections, tally, seconds)
        self.backlog: deque[float] = deque()
        self._spare: deque[_Caller] = deque()
        self._made = 0
        self._max = max_in_flight
        self._most_late = most_late

    def arrive(self, moment: float) -> None:
        """Makes a call that was to begin at `moment`, at once if a place is free."""
        if perf_counter() - moment > self._most_late:
            self.tally.errors["left out"] += 1
        elif self._spare:
            self.begin(self._spare.popleft(), moment)
        elif self._made < self._max:
            caller = _Caller(self, self._made % len(self.parked))
            self._made += 1
            self.begin(caller, moment)
        else:
            self.backlog.append(moment)

    def measure(self, started: float, now: float) -> None:
        """Counts an answer."""
        if self.tally.begin <= started < self.tally.end:
            self.tally.latencies.append(now - started)
            self.tally.last = now

    def free(self, caller: _Caller) -> None:
        """Uses a place whose call has ended."""
        if self.backlog and not self.over:
            self.begin(caller, self.backlog.popleft())
        else:
            self._spare.append(caller)
            if self.over and not self.tally.in_flight:
                self.idle.set()


@contextmanager
def quiet() -> Iterator[None]:
    """Freezes existing objects, so that garbage collection does not look like slow answers."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
