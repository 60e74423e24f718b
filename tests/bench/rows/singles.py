"""Single-sequence requests of 29 steps, 64 in flight: the cost beside an empty echo."""

from bench.contestants import AFTERNOON, EAGER, ECHO, OURS, TRITON
from bench.figures import Outcome
from bench.networks import LARGE, SMALL, even
from bench.processes import StartError
from bench.rows.row import ROUNDS_OF_LARGE, Row, against, against_triton, closed, contestants, rates, report
from bench.session import Session

IN_FLIGHT = 64
REQUESTS = 256
"""Distinct ones, asked in turn."""
TRITON_RATE = 8_400


async def measure(session: Session, outcome: Outcome) -> None:
    """Closed loop on both networks; the echoes get the messages of the small one."""
    for network, rounds in ((SMALL, session.rounds), (LARGE, ROUNDS_OF_LARGE)):
        groups = [[sequence] for sequence in even(network, REQUESTS)]
        names = [*OURS, AFTERNOON, EAGER, *(session.peers & {TRITON})]
        there = await contestants(session, outcome, names, network, groups)
        if network == SMALL:
            for echo in ECHO.values():
                try:
                    there[echo] = await session.echo(echo, there[AFTERNOON])
                except StartError as error:
                    outcome.notes.append(f"{echo}: {error}")
        results = await closed(session, there.values(), IN_FLIGHT, rounds=rounds)
        report(outcome, results, 1, "" if network == SMALL else f", {network}")
        if network == SMALL:
            samples = rates(results, 1)
            for ours in OURS:
                against(outcome, samples, ours, ECHO[ours], 0.6, "%")
                against_triton(session, outcome, samples, ours, 2, TRITON_RATE)


ROW = Row("singles", "server, single-sequence requests of 29 steps, 64 in flight, requests/s", measure)
