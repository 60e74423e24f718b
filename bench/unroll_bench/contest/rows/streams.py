"""One-step chunks of streams while bulk work saturates the engine, and without it."""

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial

from unroll_bench.contest.asking import Contestant
from unroll_bench.contest.contestants import OURS
from unroll_bench.contest.figures import Figure, Outcome, Verdict, ratios
from unroll_bench.contest.network import even
from unroll_bench.contest.rows.row import WARM_UP, Row, grouped, hold, p99_ms, take_late
from unroll_bench.contest.rows.streaming import feed
from unroll_bench.contest.session import Session
from unroll_bench.load import Result, closed_loop

SEQUENCES, STREAMS, CADENCE = 32, 4, 0.02
BULK, BULK_IN_FLIGHT = 64, 8
Feed = Callable[[], Awaitable[Result]]


async def measure(session: Session, outcome: Outcome) -> None:
    """Measures the latency of every chunk from its intended start, with and without load, in turns."""
    for ours, bulk in (await session.contestants(outcome, OURS, grouped(even(8 * BULK), BULK))).items():
        unloaded = partial(feed, bulk.address, SEQUENCES, STREAMS, CADENCE, session.seconds, WARM_UP)
        results = await session.in_turns(
            {"unloaded": unloaded, "beside bulk": partial(_loaded, session, bulk, unloaded, outcome)}
        )
        p99: dict[str, list[float]] = {}
        for how, rounds in results.items():
            p99[how] = []
            for result in rounds:
                if late := take_late(result):
                    outcome.notes.append(f"{ours}, {how}: {late} steps not sent or not answered in time")
                hold(ours, result)
                p99[how].append(p99_ms(result, late, session.seconds))
            outcome.figures.append(Figure(f"{ours}, {how}", "p99 ms", p99[how]))
            outcome.figures.append(Figure(f"{ours}, {how}", "p50 ms", [r.percentile(50) * 1e3 for r in rounds]))
        growth = ratios(p99["beside bulk"], p99["unloaded"])
        outcome.verdicts.append(Verdict(f"p99 beside bulk / unloaded, {ours}", growth, 3, at_least=False))
    outcome.notes.append(
        f"{SEQUENCES} sequences, a step each {CADENCE * 1e3:.0f} ms; bulk: {BULK_IN_FLIGHT} requests of {BULK} "
        "sequences in flight, sent by the same process"
    )


async def _loaded(session: Session, bulk: Contestant, unloaded: Feed, outcome: Outcome) -> Result:
    """Runs `unloaded` within a longer run of bulk requests."""
    loop = closed_loop(
        bulk.address, bulk.calls, in_flight=BULK_IN_FLIGHT, seconds=session.seconds + 2 * WARM_UP, warm_up=0.0
    )
    beside, result = await asyncio.gather(loop, unloaded())
    hold(bulk.name, beside)
    outcome.figures.append(Figure(f"{bulk.name}, bulk beside streams", "sequences/s", [beside.rate * BULK]))
    return result


ROW = Row("streams", "one-step stream chunks, p99 beside bulk that saturates the engine", measure)
