"""One request in flight: what a caller waits for where nobody else is served."""

from bench.contestants import AFTERNOON, OURS, TRITON
from bench.figures import Outcome, Spread, Verdict, ratios
from bench.networks import SMALL, even
from bench.rows.row import ISSUE, Row, closed, contestants, report
from bench.session import Session

REQUESTS = 64
QUOTED = {TRITON: 0.30, AFTERNOON: 0.35}
"""Milliseconds in the issue."""


async def measure(session: Session, outcome: Outcome) -> None:
    """Closed loop of one; the best of ours against each of the others."""
    groups = [[sequence] for sequence in even(SMALL, REQUESTS)]
    names = [*OURS, AFTERNOON, *(session.peers & {TRITON})]
    results = await closed(session, (await contestants(session, outcome, names, SMALL, groups)).values(), 1)
    report(outcome, results, 1)
    medians = {name: [result.percentile(50) * 1e3 for result in rounds] for name, rounds in results.items()}
    best = min((name for name in OURS if name in medians), key=lambda name: Spread.of(medians[name]).median)
    for other in (AFTERNOON, TRITON):
        if other in medians:
            samples = ratios(medians[best], medians[other])
            outcome.verdicts.append(Verdict(f"{best} / {other}", samples, 1, at_least=False))
        else:
            bar = QUOTED[other]
            claim = f"{best}, under {other}'s {bar:.2f} ms"
            outcome.verdicts.append(Verdict(claim, medians[best], bar, at_least=False, unit="ms", source=ISSUE))


ROW = Row("latency", "one request of 29 steps in flight, median latency", measure)
