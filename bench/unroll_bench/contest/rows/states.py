"""Streamed hidden states, one message per step."""

from functools import partial

from unroll_bench.contest.contestants import OURS
from unroll_bench.contest.figures import Figure, Outcome, Verdict
from unroll_bench.contest.processes import StartError
from unroll_bench.contest.rows.row import WARM_UP, Row, hold
from unroll_bench.contest.rows.streaming import feed
from unroll_bench.contest.session import Session

SEQUENCES, STREAMS = 256, 8
MESSAGES = 60_000
"""Required messages per second on one core."""


async def measure(session: Session, outcome: Outcome) -> None:
    """Measures sequences whose next step leaves when the last one is answered."""
    addresses = {}
    for ours in OURS:
        try:
            addresses[ours] = (await session.server(ours)).address
        except StartError as error:
            outcome.notes.append(f"{ours}: {error}")
    results = await session.in_turns(
        {
            ours: partial(feed, address, SEQUENCES, STREAMS, None, session.seconds, WARM_UP)
            for ours, address in addresses.items()
        }
    )
    for ours, rounds in results.items():
        for result in rounds:
            hold(ours, result)
        messages = [result.messages / result.seconds for result in rounds]
        outcome.figures.append(Figure(ours, "messages/s", messages))
        outcome.verdicts.append(Verdict(f"{ours}, messages of one step", messages, MESSAGES, unit="/s"))
    outcome.notes.append(f"{SEQUENCES} sequences on {STREAMS} streams, 128 float32 a step")


ROW = Row("states", "states streamed, one message a step, messages/s a core", measure)
