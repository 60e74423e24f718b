"""Streamed hidden states, one step at a time: one sequence per message, and many."""

from functools import partial
from typing import NamedTuple

from unroll_bench.contest.contestants import GRPCIO, OURS
from unroll_bench.contest.figures import Figure, Outcome, Verdict, ratios
from unroll_bench.contest.processes import StartError
from unroll_bench.contest.rows.row import WARM_UP, Row, hold
from unroll_bench.contest.rows.streaming import feed
from unroll_bench.contest.session import Session


class _Way(NamedTuple):
    """A way to send the steps.

    Attributes:
        name: Its name in the table.
        sequences: Open sequences.
        streams: Calls that carry them.
        batch: Sequences of one message.
        bar: Steps a second on one core.
        ratio: The same, as a multiple of what the transport grpcio does with one sequence a message.
    """

    name: str
    sequences: int
    streams: int
    batch: int
    bar: int
    ratio: int


ONE = _Way("one key a message", 256, 8, 1, 60_000, 5)
MANY = _Way("many keys a message", 2000, 2, 1000, 250_000, 20)


async def measure(session: Session, outcome: Outcome) -> None:
    """Measures sequences whose next step leaves when the last ones of its message are answered."""
    addresses = {}
    for ours in OURS:
        try:
            addresses[ours] = (await session.server(ours)).address
        except StartError as error:
            outcome.notes.append(f"{ours}: {error}")
    results = await session.in_turns(
        {
            (ours, way): partial(feed, address, *way[1:3], None, session.seconds, WARM_UP, way.batch)
            for ours, address in addresses.items()
            for way in (ONE, MANY)
        }
    )
    rates = {}
    for (ours, way), rounds in results.items():
        for result in rounds:
            hold(ours, result)
        rates[ours, way] = [result.messages / result.seconds for result in rounds]
        outcome.figures.append(Figure(f"{ours}, {way.name}", "steps/s", rates[ours, way]))
    for (ours, way), steps in rates.items():
        if ours == GRPCIO:
            continue
        outcome.verdicts.append(Verdict(f"{ours}, {way.name}, steps", steps, way.bar, unit="/s"))
        if (GRPCIO, ONE) in rates:
            claim = f"{ours}, {way.name} / {GRPCIO}, {ONE.name}"
            outcome.verdicts.append(Verdict(claim, ratios(steps, rates[GRPCIO, ONE]), way.ratio))
    outcome.notes += [f"{way.name}: {way.sequences} sequences on {way.streams} streams" for way in (ONE, MANY)]
    outcome.notes.append("128 float32 a step")


ROW = Row("states", "one-step stream messages, steps/s a core", measure)
