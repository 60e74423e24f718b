"""Refusals by Envoy itself, before Python hears of a call: what they cost is what overload takes from good answers.

Envoy's Lua filter and the worker inside that Envoy share a file in memory: numbers (`NUMBERS` bytes of float64, each
written by one side alone), then lines of text that say which methods are meant and what a refusal says. The filter
refuses what the engine's books would. It also knows what came through and is not on the books yet, its message on the
way: by Little's law a call waits for all that is in flight over the rate of answers, and more than a share of the time
to its deadline is too long.
"""

import asyncio
import base64
import mmap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

import grpc

from unroll_engine.admission import BYTES, DEADLINE, STEPS, ServiceRate
from unroll_engine.errors import OverloadedError
from unroll_server.fronts.gate_filter import NUMBERS
from unroll_server.interceptors import status_of
from unroll_server.metrics import Metrics

_SHARE, _FLOOR, _FULL = range(3)
_KIND = (8, 12)
"""Where the numbers of bulk work begin, and those of what goes before it."""
_PASSED, _ENDED, _RATE, _HORIZON = range(4)
_REFUSED = 16
SHARE = 0.4
"""Share of the time to its deadline that a call may be expected to wait for those in flight. Less than the engine's
books allow: to refuse in Python what has come through costs more than the difference."""
FLOOR = 16
"""Calls in flight that are no overload, whatever they ask; and that, in flight throughout a window, tell the rate."""
DELAYS = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
"""Seconds after which the refused are told to come again: the first that is enough."""
LOOK = 0.02
"""Seconds between two looks at the books, and at what Envoy refused."""
_REASONS = {
    DEADLINE: "too much is in flight for an answer within the deadline",
    STEPS: "the queue is full in timesteps",
    BYTES: "the queue is full in bytes",
}
_NUMBER_OF = {reason: number for number, reason in enumerate(_REASONS)}
_CAUSES = ("deadline", "steps", "bytes")
"""What the metrics call them, in the same order."""
_TOO_MUCH: int = grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]


class Books(Protocol):
    """What is queued; see AdmissionController."""

    def horizon(self, interactive: bool) -> float:
        """Seconds left, at least, of a call that is not refused."""
        ...

    @property
    def full(self) -> str:
        """The reason, `QUEUED_STEPS` or `QUEUED_BYTES`, where that is infinite; else nothing."""
        ...

    def refused(self, cause: str) -> None:
        """Counts a call that was refused elsewhere."""
        ...


class _Kind:
    """Calls of one kind: neither bulk work nor what goes before it waits for the other's calls in flight."""

    def __init__(self, interactive: bool, numbers: "memoryview[float]") -> None:
        self.interactive = interactive
        self.shared = numbers
        self.numbers = numbers[_KIND[interactive] :]
        self.rate = ServiceRate(FLOOR)
        self.inside = 0

    def refresh(self, books: Books) -> None:
        """Where some are refused, the next one may not be, and the other way round."""
        if self.numbers[_HORIZON]:
            self._tell(books)

    def look(self, books: Books, now: float) -> bool:
        """Looks after both sides' numbers; returns whether anybody is there, or is refused."""
        numbers = self.numbers
        numbers[_RATE] = rate = self.rate.of(now) or 0.0
        horizon = self._tell(books)
        if not self.inside:
            # What left before it came here was never counted as ended.
            numbers[_ENDED] = numbers[_PASSED]
        return bool(self.inside or rate or horizon)

    def _tell(self, books: Books) -> float:
        # First the reason, which Envoy reads where there is no room at all.
        if full := books.full:
            self.shared[_FULL] = _NUMBER_OF[full]
        self.numbers[_HORIZON] = horizon = books.horizon(self.interactive)
        return horizon


class Gate:
    """What the front tells the filter. Made, opened and used on the event loop, before Envoy takes calls.

    Args:
        path: The file, which `open` makes.
        metrics: Counts the calls that are refused.
    """

    def __init__(self, path: Path, metrics: Metrics) -> None:
        self._path = path
        self._metrics = metrics
        self._loop = asyncio.get_running_loop()
        self._looking = False
        self._kinds: dict[str, _Kind] = {}

    def open(self, books: Books, methods: Mapping[str, bool]) -> None:
        """Makes the file.

        Args:
            books: Asked what would be refused.
            methods: Those that are refused, as `/package.Service/Method`: with one request, and work; of each, whether
                its work goes before bulk work.
        """
        self._books = books
        self._methods = [self._metrics.method(method, "unary") for method in sorted(methods)]
        self._counted = [0.0] * (len(_REASONS) * len(self._methods))
        lines = [f"method {place} {_KIND[methods[method]]} {method}" for place, method in enumerate(sorted(methods))]
        self._path.write_bytes(bytes(NUMBERS) + "\n".join([*lines, *_refusals(), ""]).encode())
        with self._path.open("r+b") as file:
            self._numbers = memoryview(mmap.mmap(file.fileno(), NUMBERS)).cast("d")
        self._numbers[_SHARE] = SHARE
        self._numbers[_FLOOR] = FLOOR
        self._both = [_Kind(interactive, self._numbers) for interactive in (False, True)]
        self._kinds = {method: self._both[interactive] for method, interactive in methods.items()}

    def enter(self, method: str) -> bool:
        """A call has come through; returns whether it is one of those that count, for which `leave` is to be called."""
        kind = self._kinds.get(method)
        if kind is None:
            return False
        if not kind.inside:
            kind.rate.begin(self._loop.time())
        kind.inside += 1
        kind.refresh(self._books)
        if not self._looking:
            self._looking = True
            self._loop.call_later(LOOK, self._look)
        return True

    def leave(self, method: str, answered: bool) -> None:
        """A call that counts has ended, with an answer or without one."""
        kind = self._kinds[method]
        kind.inside -= 1
        kind.rate.end(int(answered), kind.inside, self._loop.time())
        kind.numbers[_ENDED] += 1
        kind.refresh(self._books)

    def _look(self) -> None:
        """Looks after both sides' numbers, and at what Envoy refused, until nobody is refused any more."""
        now = self._loop.time()
        looked = [kind.look(self._books, now) for kind in self._both]
        self._count()
        self._looking = any(looked)
        if self._looking:
            self._loop.call_later(LOOK, self._look)

    def _count(self) -> None:
        for place, figures in enumerate(self._methods):
            for number, cause in enumerate(_CAUSES, len(_CAUSES) * place):
                refused = self._numbers[_REFUSED + number]
                for _ in range(int(refused - self._counted[number])):
                    figures.started()
                    figures.handled(_TOO_MUCH, 0.0)
                    self._books.refused(cause)
                self._counted[number] = refused


def _refusals() -> Iterator[str]:
    for reason, message in _REASONS.items():
        for seconds in DELAYS:
            status = status_of(OverloadedError(message, seconds, reason))
            details = base64.b64encode(status.SerializeToString()).rstrip(b"=").decode()
            yield f"refusal {reason} {seconds} {round(seconds * 1000)} {details} {message}"
