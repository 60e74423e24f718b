"""One-step chunks of streams while bulk work saturates the engine, and without it."""

import asyncio
from collections.abc import Callable
from functools import partial

from bench.asking import Contestant
from bench.contestants import OURS
from bench.figures import Figure, Outcome, Verdict, ratios
from bench.networks import SMALL, even
from bench.rows import streaming
from bench.rows.row import WARM_UP, Row, contestants, hold, p99_ms, take_late
from bench.session import Session
from unroll_client.load import Result, closed_loop, stream_loop
from unroll_proto.v1 import unroll_pb2 as pb

SEQUENCES, STREAMS, CADENCE = 32, 4, 0.02
BULK, BULK_IN_FLIGHT = 64, 8
Check = Callable[[pb.Steps], bool]


async def measure(session: Session, outcome: Outcome) -> None:
    """Latency of every chunk from when it should have been sent, with and without load, in turns."""
    sequences = even(SMALL, 8 * BULK)
    groups = [sequences[start : start + BULK] for start in range(0, len(sequences), BULK)]
    check = streaming.state_check(SMALL)
    for ours, bulk in (await contestants(session, outcome, OURS, SMALL, groups)).items():
        results = await session.in_turns(
            {
                "unloaded": partial(_unloaded, session, bulk.address, check),
                "beside bulk": partial(_loaded, session, bulk, check, outcome),
            }
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


async def _unloaded(session: Session, address: str, check: Check) -> Result:
    return await stream_loop(
        address,
        sequences=SEQUENCES,
        streams=STREAMS,
        cadence=CADENCE,
        chunk_steps=1,
        seconds=session.seconds,
        warm_up=WARM_UP,
        model=SMALL,
        values=streaming.values(SMALL),
        check=check,
    )


async def _loaded(session: Session, bulk: Contestant, check: Check, outcome: Outcome) -> Result:
    """The same, within a longer run of bulk requests."""
    loop = closed_loop(
        bulk.address, bulk.calls, in_flight=BULK_IN_FLIGHT, seconds=session.seconds + 2 * WARM_UP, warm_up=0.0
    )
    beside, result = await asyncio.gather(loop, _unloaded(session, bulk.address, check))
    hold(bulk.name, beside)
    outcome.figures.append(Figure(f"{bulk.name}, bulk beside streams", "sequences/s", [beside.rate * BULK]))
    return result


ROW = Row("streams", "one-step stream chunks, p99 beside bulk that saturates the engine", measure)
