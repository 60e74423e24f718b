"""One sequence of 5 to 120 steps a request, 64 in flight: what lengths of all kinds cost."""

from bench.contestants import AFTERNOON, EAGER, OURS, TRITON
from bench.figures import Outcome
from bench.networks import LARGE, SMALL, ragged
from bench.rows.row import ROUNDS_OF_LARGE, Row, against, against_triton, closed, contestants, rates, report
from bench.session import Session

IN_FLIGHT = 64
REQUESTS = 232
"""Distinct ones, asked in turn: each length twice."""
TRITON_RATE = 4_000


async def measure(session: Session, outcome: Outcome) -> None:
    """Closed loop on both networks."""
    for network, rounds in ((SMALL, session.rounds), (LARGE, ROUNDS_OF_LARGE)):
        groups = [[sequence] for sequence in ragged(network, REQUESTS)]
        names = [*OURS, AFTERNOON, EAGER, *(session.peers & {TRITON})]
        there = await contestants(session, outcome, names, network, groups)
        results = await closed(session, there.values(), IN_FLIGHT, rounds=rounds)
        report(outcome, results, 1, "" if network == SMALL else f", {network}")
        if network == SMALL:
            samples = rates(results, 1)
            for ours in OURS:
                against(outcome, samples, ours, AFTERNOON, 2)
                against_triton(session, outcome, samples, ours, 3, TRITON_RATE)


ROW = Row("ragged", "lengths 5..120, one sequence a request, 64 in flight, requests/s", measure)
