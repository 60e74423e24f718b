"""The engine without gRPC against onnxruntime alone: what scheduling, gathering and scattering cost."""

from functools import partial

from bench.figures import Figure, Outcome, Spread, Verdict, ratios
from bench.inside.engine import alone_steps, ragged_steps
from bench.networks import LARGE, SMALL
from bench.rows.row import ROUNDS_OF_LARGE, Row
from bench.session import Session

LANES = 64
ENGINE = "our engine without gRPC"
ALONE = "onnxruntime alone"


async def measure(session: Session, outcome: Outcome) -> None:
    """Both in the worker process, in turns, on both networks."""
    for network, rounds in ((SMALL, session.rounds), (LARGE, ROUNDS_OF_LARGE)):
        suffix = "" if network == SMALL else f", {network}"
        repository = await session.repository(network)
        results = await session.in_turns(
            {
                ENGINE: partial(session.inside, ragged_steps, repository, LANES, session.seconds),
                ALONE: partial(session.inside, alone_steps, repository, LANES, session.seconds),
            },
            rounds,
        )
        real = [rates[0] for rates in results[ENGINE]]
        computed = [rates[1] for rates in results[ENGINE]]
        alone = [rates[0] for rates in results[ALONE]]
        outcome.figures += [
            Figure(ENGINE, f"steps/s of sequences{suffix}", real),
            Figure(ENGINE, f"steps/s with padding{suffix}", computed),
            Figure(ALONE, f"steps/s of sequences{suffix}", alone),
        ]
        if network == SMALL:
            outcome.verdicts.append(Verdict(f"{ENGINE} / {ALONE}", ratios(real, alone), 1.25, unit="%"))
        share = Spread.of(ratios(computed, alone)).median
        outcome.notes.append(f"{network}: with the padding within ticks, {share:.0%} of onnxruntime alone")


ROW = Row("engine", "engine without gRPC, lengths 5..120, 64 lanes, hidden 128, steps/s", measure)
