"""Cost per sequence, by the length of the queue."""

from bench.figures import Figure, Outcome, Verdict, ratios
from bench.inside.queue import STEPS, seconds_per_sequence
from bench.networks import SMALL
from bench.rows.row import Row
from bench.session import Session

SHORT, LONG = 1_000, 100_000
REPEATS = 20
"""Short queues in a round, for as much as one long one would vary."""


async def measure(session: Session, outcome: Outcome) -> None:
    """Queues of both lengths, in turns; each round's short one is the mean of several."""
    repository = await session.repository(SMALL)

    async def short() -> float:
        return sum([await session.inside(seconds_per_sequence, repository, SHORT) for _ in range(REPEATS)]) / REPEATS

    async def long() -> float:
        return await session.inside(seconds_per_sequence, repository, LONG)

    results = await session.in_turns({SHORT: short, LONG: long})
    for waiting, samples in results.items():
        outcome.figures.append(Figure(f"queue of {waiting:,}", "us a sequence", [sample * 1e6 for sample in samples]))
    growth = ratios(results[LONG], results[SHORT])
    outcome.verdicts.append(Verdict(f"queue of {LONG:,} / of {SHORT:,}", growth, 1.2, at_least=False))
    outcome.notes.append(f"requests of one sequence of {STEPS} steps, 64 lanes, all queued before the first runs")


ROW = Row("queue", "cost per sequence, queue of 1,000 against 100,000", measure)
