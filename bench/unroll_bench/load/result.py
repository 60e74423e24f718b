"""Results of a load run: the latency of every call, rates, errors."""

from array import array
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Call:
    """One unary call to make.

    Attributes:
        path: Of the method, as "/unroll.v1.UnrollService/Classify".
        message: The serialized request.
        check: Says whether an answer's serialized message is right; it is asked about every answer, between calls, so
            it has to be cheap.
    """

    path: str
    message: bytes
    check: Callable[[bytes], bool] | None = None


@dataclass(slots=True)
class Result:
    """A load run.

    Attributes:
        latencies: float64 [calls], seconds; of a closed loop from the sending, of anything with a schedule from when
            the call should have been sent.
        seconds: Length of the measured window: as asked for, or to the last answer that belongs to it.
        calls: Calls answered with OK in the window; chunks, of a stream.
        errors: What else became of calls, by status or reason, warm-up and end included.
        wrong: Answers that the check refused, warm-up and end included.
        messages: Messages that streams answered in the window.
    """

    latencies: NDArray[np.float64]
    seconds: float
    calls: int
    errors: Counter[str]
    wrong: int
    messages: int = 0

    @property
    def rate(self) -> float:
        """Calls a second."""
        return self.calls / self.seconds if self.seconds else 0.0

    def percentile(self, q: float) -> float:
        """The latency in seconds that `q` percent of calls stay at or under; NaN where there are none."""
        return float(np.percentile(self.latencies, q, method="higher")) if len(self.latencies) else float("nan")


class Tally:
    """Counters of a run, which can be read while it goes on.

    Attributes:
        latencies: Seconds, of the calls measured so far.
        errors: As in `Result`.
        wrong: As in `Result`.
        in_flight: Calls, or chunks, that wait for an answer.
        messages: As in `Result`.
        begin: Begin of the measured window, in seconds of `time.perf_counter`; it is not measured before.
        end: Its end.
        last: When the last measured answer came.
    """

    def __init__(self) -> None:
        # It grows by doubling, so that counting an answer costs about 30 ns.
        self.latencies = array("d")
        self.errors: Counter[str] = Counter()
        self.wrong = 0
        self.in_flight = 0
        self.messages = 0
        self.begin = float("inf")
        self.end = float("inf")
        self.last = 0.0

    def result(self, seconds: float) -> Result:
        """Everything counted, as a value of its own."""
        return Result(
            latencies=np.array(self.latencies, np.float64),
            seconds=seconds,
            calls=len(self.latencies),
            errors=Counter(self.errors),
            wrong=self.wrong,
            messages=self.messages,
        )
