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
        path: Path of the method, such as "/unroll.v1.UnrollService/Classify".
        message: The serialized request.
        check: Returns True if an answer's serialized message is right; called between calls, so it must be fast.
    """

    path: str
    message: bytes
    check: Callable[[bytes], bool] | None = None


@dataclass(slots=True)
class Result:
    """A load run.

    Attributes:
        latencies: float64 [calls], seconds; in a closed loop from the sending, with a schedule from the intended
            start.
        seconds: Length of the measured window: as requested, or to its last answer.
        calls: Calls answered with OK in the window; on streams, chunks.
        errors: Failed calls by status or reason, warm-up and end included.
        wrong: Answers that failed the check, warm-up and end included.
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
        """Calls per second."""
        return self.calls / self.seconds if self.seconds else 0.0

    def percentile(self, q: float) -> float:
        """Returns the latency in seconds that `q` percent of calls do not exceed; NaN if there are none."""
        return float(np.percentile(self.latencies, q, method="higher")) if len(self.latencies) else float("nan")


class Tally:
    """Counters of a run, which can be read while it runs.

    Attributes:
        latencies: Seconds of the calls measured so far.
        errors: As in `Result`.
        wrong: As in `Result`.
        in_flight: Calls, or chunks, in flight.
        messages: As in `Result`.
        begin: Begin of the measured window, in seconds of `time.perf_counter`.
        end: End of the window.
        last: Time of the last measured answer.
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
        """Returns the counts as a value."""
        return Result(
            latencies=np.array(self.latencies, np.float64),
            seconds=seconds,
            calls=len(self.latencies),
            errors=Counter(self.errors),
            wrong=self.wrong,
            messages=self.messages,
        )
