"""Arrivals at random moments, lengths 5 to 120: latency under load, from each call's intended beginning."""

from collections.abc import Mapping
from functools import partial
from itertools import count

from bench.asking import Contestant
from bench.contestants import AFTERNOON, OURS
from bench.figures import Curve, Figure, Outcome, Verdict, ratios
from bench.networks import SMALL, ragged
from bench.rows.row import WARM_UP, Row, closed, contestants, hold, p99_ms, take_late
from bench.session import Session
from unroll_client.load import Result, open_loop

PEAK_IN_FLIGHT = 64
LOAD = 0.7
SWEEP = (0.1, 0.3, 0.5, 0.7, 0.8, 0.9)
"""Shares of each one's own peak, for the curve."""
REQUESTS = 232
MAX_IN_FLIGHT = 512
"""Of a server that is asked for more than it can do, what is then still to be waited for."""
PEAK_ROUNDS = 2


async def measure(session: Session, outcome: Outcome) -> None:
    """Peaks by a closed loop; then Poisson arrivals at 70 % of the afternoon server's peak, and of ours."""
    groups = [[sequence] for sequence in ragged(SMALL, REQUESTS)]
    there = await contestants(session, outcome, [*OURS, AFTERNOON], SMALL, groups)
    rounds = await closed(session, there.values(), PEAK_IN_FLIGHT, rounds=PEAK_ROUNDS)
    peaks = {name: min(result.rate for result in results) for name, results in rounds.items()}
    for name, peak in peaks.items():
        outcome.figures.append(Figure(name, "requests/s, peak", [peak]))
    await _at_rate(session, outcome, there, AFTERNOON, LOAD * peaks[AFTERNOON])
    for ours in OURS:
        if ours in there:
            pair = {name: there[name] for name in (ours, AFTERNOON)}
            await _at_rate(session, outcome, pair, ours, LOAD * peaks[ours])
    await _sweep(session, outcome, there, peaks)


async def _at_rate(
    session: Session, outcome: Outcome, asked: Mapping[str, Contestant], whose: str, rate: float
) -> None:
    results = await session.in_turns(
        {name: partial(_poisson, session, each, rate, count()) for name, each in asked.items()}
    )
    offered = f"at {LOAD:.0%} of the peak of {whose}, {rate:,.0f}/s"
    p99: dict[str, list[float]] = {}
    for name, rounds in results.items():
        if name in OURS:
            late = [take_late(result) for result in rounds]
            for result in rounds:
                hold(name, result)
        else:
            late = [result.errors.total() for result in rounds]
        if any(late):
            what = f"calls not sent or not answered in time, each counted as {session.seconds:g} s"
            outcome.notes.append(f"{name} {offered}: {sum(late)} {what}")
        p99[name] = [p99_ms(*each, session.seconds) for each in zip(rounds, late, strict=True)]
        outcome.figures.append(Figure(name, f"p99 ms {offered}", p99[name]))
    for ours in (name for name in OURS if name in asked):
        claim = f"{ours} / {AFTERNOON}, p99 {offered}"
        outcome.verdicts.append(Verdict(claim, ratios(p99[ours], p99[AFTERNOON]), 0.5, at_least=False))


async def _sweep(
    session: Session, outcome: Outcome, asked: Mapping[str, Contestant], peaks: Mapping[str, float]
) -> None:
    measures = {
        (name, share): partial(_poisson, session, each, share * peaks[name], count())
        for share in SWEEP
        for name, each in asked.items()
    }
    results = await session.in_turns(measures, rounds=1)
    for name in asked:
        points = [results[name, share][0] for share in SWEEP]
        outcome.curves.append(
            Curve(
                name,
                [share * peaks[name] for share in SWEEP],
                [point.percentile(50) for point in points],
                [point.percentile(99) for point in points],
            )
        )


async def _poisson(session: Session, contestant: Contestant, rate: float, seeds: "count[int]") -> Result:
    """One open loop; the rounds' arrivals differ, those of one round are alike for all."""
    return await open_loop(
        contestant.address,
        contestant.calls,
        rate=rate,
        seconds=session.seconds,
        warm_up=WARM_UP,
        seed=next(seeds),
        max_in_flight=MAX_IN_FLIGHT,
    )


ROW = Row("open", "p99 at 70 % of peak, lengths 5..120, Poisson arrivals", measure)
