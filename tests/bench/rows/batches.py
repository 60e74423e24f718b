"""Requests of 64 sequences of 29 steps: how much of the arithmetic reaches a caller."""

from functools import partial

from bench.contestants import AFTERNOON, EAGER, OURS, TORCHSCRIPT, TRITON
from bench.figures import Outcome
from bench.inside import engine
from bench.networks import LARGE, SMALL, even
from bench.rows.row import ROUNDS_OF_LARGE, Row, against, against_figure, closed, contestants, rates, report
from bench.session import Session

LANES = 64
REQUESTS = 8
"""Distinct ones, asked in turn."""
IN_FLIGHT = 8
INSIDE = "our engine without gRPC"
PEER = 29_000
"""Sequences/s of the best peer in the issue: TorchServe and Triton with TorchScript."""


async def measure(session: Session, outcome: Outcome) -> None:
    """Closed loop on both networks; our engine without gRPC takes its turns with the servers."""
    for network, rounds in ((SMALL, session.rounds), (LARGE, ROUNDS_OF_LARGE)):
        values = even(network, REQUESTS * LANES)
        groups = [values[start : start + LANES] for start in range(0, len(values), LANES)]
        names = [*OURS, AFTERNOON, TORCHSCRIPT, EAGER, *(session.peers & {TRITON})]
        there = await contestants(session, outcome, names, network, groups)
        repository = await session.repository(network)
        inside = partial(session.inside, engine.even_batches, repository, LANES, IN_FLIGHT, session.seconds)
        results = await closed(session, there.values(), IN_FLIGHT, {INSIDE: inside}, rounds)
        report(outcome, results, LANES, "" if network == SMALL else f", {network}")
        if network == SMALL:
            samples = rates(results, LANES)
            for ours in OURS:
                against(outcome, samples, ours, AFTERNOON, 4)
                against(outcome, samples, ours, TORCHSCRIPT, 2.5)
                if TRITON in session.peers:
                    against(outcome, samples, ours, TRITON, 2.5)
                against_figure(outcome, samples, ours, "best peer", PEER, 2.5)
                against(outcome, samples, ours, INSIDE, 0.75, "%")
    outcome.notes.append(f"{IN_FLIGHT} requests in flight")


ROW = Row("batches", "server, requests of 64 sequences of 29 steps, sequences/s", measure)
