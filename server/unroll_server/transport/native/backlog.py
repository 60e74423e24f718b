"""Calls that wait for a busy engine as bytes: once begun, each would be some thirty objects and its arrays."""

import heapq
from collections.abc import Callable, Mapping
from itertools import count

from unroll_engine.admission import AdmissionController
from unroll_engine.scheduler import IMPLICIT_DEADLINE
from unroll_server.transport.native._http2 import Call
from unroll_server.transport.registry import ComposedMethod

MOST_GONE = 64
"""Calls that have left and may still be in the heap, beyond half of it."""


class WaitingCall:
    """A call that has arrived and waits for the engine. It stands in the place of the call's context.

    Attributes:
        call: The call; None once it has begun or left.
        message: Its message.
        since: Time on the clock of admission at which it began to wait.
        deadline: Its deadline.
        bytes: Size of its message.
        due: See admission.Expected; as `steps`.
    """

    __slots__ = ("_backlog", "bytes", "call", "deadline", "due", "message", "since", "steps")
    due: int
    steps: int

    def __init__(self, backlog: "Backlog", call: Call, message: bytes, since: float) -> None:
        self._backlog = backlog
        self.call: Call | None = call
        self.message = message
        self.since = since
        self.deadline = min(call.deadline, since + IMPLICIT_DEADLINE)
        self.bytes = len(message)

    def abandon(self) -> None:
        """Gives up the call, which has ended: its caller has left, or its deadline has passed."""
        self._backlog.remove(self)


class Backlog:
    """Calls that wait while others like them keep the engine busy, by deadline. Admission counts them as queued.

    Work of other kinds, such as that of streams, does not let them wait: the engine's own queue shares it out.

    Args:
        admission: Says how much work keeps the engine busy.
        methods: The methods that give the engine bulk work, by number. Calls of others never wait.
        begin: Begins a call: called with it, its message, and the seconds for which it has waited. `ended` follows.
    """

    def __init__(
        self,
        admission: AdmissionController,
        methods: Mapping[int, ComposedMethod],
        begin: Callable[[Call, bytes, float], None],
    ) -> None:
        self._admission = admission
        self._counts = {number: method.counts for number, method in methods.items()}
        self._step_marks = {number: method.work.step_mark for number, method in methods.items() if method.work}
        self._begin = begin
        self._heap: list[tuple[float, int, WaitingCall]] = []
        self._numbers = count()
        # Calls that are begun and not ended, and as many as keep the engine busy.
        self._begun = 0
        self._most = 0.0
        self._gone = 0

    def add(self, call: Call, message: bytes, now: float) -> bool:
        """Takes over a call that has arrived, which begins at once or waits; returns False if it never waits."""
        if call.method not in self._counts:
            return False
        if call.finished:
            self._counts[call.method].refused(call.code, 1)
        elif self._begun < self._most:
            self._begun += 1
            self._begin(call, message, 0.0)
        elif (mark := self._step_marks[call.method]) and mark in message:
            return False
        else:
            waiting = call.context = WaitingCall(self, call, message, now)
            self._admission.reserve(waiting, now)
            heapq.heappush(self._heap, (waiting.deadline, next(self._numbers), waiting))
        return True

    def begin(self, now: float) -> None:
        """Begins calls until the engine has enough work; called once a turn of the event loop, before `add`."""
        self._most = self._admission.ahead / self._admission.likely_steps
        while self._heap and self._begun < self._most:
            waiting = heapq.heappop(self._heap)[2]
            if (call := waiting.call) is None:
                self._gone -= 1
            elif call.finished:
                # It is about to be abandoned.
                self._end(waiting, call)
            else:
                waiting.call = None
                self._admission.cancel(waiting)
                self._begun += 1
                self._begin(call, waiting.message, now - waiting.since)

    def ended(self) -> None:
        """Records that a call which this object has begun is over."""
        self._begun -= 1

    def remove(self, waiting: WaitingCall) -> None:
        """Removes a call that has ended, if it still waits."""
        if (call := waiting.call) is None:
            return
        self._end(waiting, call)
        self._gone += 1
        if self._gone > MOST_GONE + len(self._heap) // 2:
            self._heap = [entry for entry in self._heap if entry[2].call is not None]
            heapq.heapify(self._heap)
            self._gone = 0

    def _end(self, waiting: WaitingCall, call: Call) -> None:
        waiting.call = call.context = None
        waiting.message = b""
        self._admission.cancel(waiting)
        self._counts[call.method].refused(call.code, 1)
