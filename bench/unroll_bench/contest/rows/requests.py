"""Requests in closed loops: the share of the arithmetic that reaches callers, for one and for many."""

from collections.abc import Callable
from dataclasses import dataclass

from unroll_bench.contest.contestants import AFTERNOON, NATIVE, OURS, TORCHSCRIPT, TRITON
from unroll_bench.contest.figures import Figure, Outcome
from unroll_bench.contest.network import even, ragged
from unroll_bench.contest.rows.row import Row, against, closed, grouped
from unroll_bench.contest.session import Session
from unroll_engine.models.spec import Float32Array


@dataclass(frozen=True)
class Requests:
    """A kind of request, sent in a closed loop.

    Attributes:
        sequences: Makes the sequences of all distinct requests.
        size: Sequences of a request.
        in_flight: Requests in flight.
        bars: The least ratio of our rate to each of the others; of the median latency, the largest. Those to Triton
            hold for the native transport.
        latency: True if the bars are on median latency.
    """

    sequences: Callable[[], list[Float32Array]]
    size: int
    in_flight: int
    bars: dict[str, float]
    latency: bool = False

    async def measure(self, session: Session, outcome: Outcome) -> None:
        """Measures every contestant that a bar names."""
        names = [*OURS, *(name for name in self.bars if name != TRITON or name in session.peers)]
        if AFTERNOON not in names:
            names.append(AFTERNOON)
        there = await session.contestants(outcome, names, grouped(self.sequences(), self.size))
        results = await closed(session, there.values(), self.in_flight)
        rates = {name: [each.rate * self.size for each in rounds] for name, rounds in results.items()}
        medians = {name: [each.percentile(50) * 1e3 for each in rounds] for name, rounds in results.items()}
        for name, rounds in results.items():
            outcome.figures += [
                Figure(name, "sequences/s", rates[name]),
                Figure(name, "p50 ms", medians[name]),
                Figure(name, "p99 ms", [each.percentile(99) * 1e3 for each in rounds]),
            ]
        samples = medians if self.latency else rates
        for theirs, bar in self.bars.items():
            for ours in (NATIVE,) if theirs == TRITON else OURS:
                against(outcome, samples, ours, theirs, bar, at_least=not self.latency)


ROWS = (
    Row(
        "batches",
        "requests of 64 sequences of 29 steps, 8 in flight, sequences/s",
        Requests(lambda: even(8 * 64), 64, 8, {AFTERNOON: 4, TORCHSCRIPT: 2.5, TRITON: 2.5}).measure,
    ),
    Row(
        "singles",
        "one sequence of 29 steps a request, 64 in flight, requests/s",
        Requests(lambda: even(256), 1, 64, {TRITON: 2.5}).measure,
    ),
    Row(
        "ragged",
        "one sequence of 5 to 120 steps a request, 64 in flight, requests/s",
        Requests(lambda: ragged(232), 1, 64, {AFTERNOON: 2, TRITON: 3.5}).measure,
    ),
    Row(
        "latency",
        "one request of 29 steps in flight, median latency",
        Requests(lambda: even(64), 1, 1, {AFTERNOON: 0.9, TRITON: 0.7}, latency=True).measure,
    ),
)
