"""Arrivals at random moments, lengths 5 to 120: latency under load, from each call's intended start."""

from functools import partial
from itertools import count

from unroll_bench.contest.asking import Contestant
from unroll_bench.contest.contestants import AFTERNOON, NATIVE
from unroll_bench.contest.figures import Figure, Outcome
from unroll_bench.contest.network import ragged
from unroll_bench.contest.rows.row import WARM_UP, Row, against, closed, grouped, hold, p99_ms, take_late
from unroll_bench.contest.session import Session
from unroll_bench.load import Result, open_loop

PEAK_IN_FLIGHT = 64
LOAD = 0.7
REQUESTS = 232
"""Distinct requests, sent in turn: each length twice."""
MAX_IN_FLIGHT = 512
"""Most calls in flight, which bounds the wait at the end for an overloaded server."""


async def measure(session: Session, outcome: Outcome) -> None:
    """Measures the afternoon server's peak by a closed loop; then Poisson arrivals at 70 % of it."""
    there = await session.contestants(outcome, [NATIVE, AFTERNOON], grouped(ragged(REQUESTS), 1))
    peaks = await closed(session, [there[AFTERNOON]], PEAK_IN_FLIGHT)
    rate = LOAD * min(result.rate for result in peaks[AFTERNOON])
    results = await session.in_turns(
        {name: partial(_poisson, session, each, rate, count()) for name, each in there.items()}
    )
    p99: dict[str, list[float]] = {}
    for name, rounds in results.items():
        late = [take_late(result) for result in rounds]
        for result in rounds:
            hold(name, result)
        if any(late):
            outcome.notes.append(
                f"{name}: {sum(late)} calls not sent or not answered in time, each counted as {session.seconds:g} s"
            )
        p99[name] = [p99_ms(*each, session.seconds) for each in zip(rounds, late, strict=True)]
        outcome.figures += [
            Figure(name, "p99 ms", p99[name]),
            Figure(name, "p50 ms", [result.percentile(50) * 1e3 for result in rounds]),
        ]
    against(outcome, p99, NATIVE, AFTERNOON, 0.3, of=f", p99 at {rate:,.0f}/s", at_least=False)


async def _poisson(session: Session, contestant: Contestant, rate: float, seeds: "count[int]") -> Result:
    """Runs one open loop; arrivals differ between rounds and are the same for all contestants of a round."""
    return await open_loop(
        contestant.address,
        contestant.calls,
        rate=rate,
        seconds=session.seconds,
        warm_up=WARM_UP,
        seed=next(seeds),
        max_in_flight=MAX_IN_FLIGHT,
    )


ROW = Row("open", "p99 at 70 % of the afternoon server's peak, lengths 5..120, Poisson arrivals", measure)
