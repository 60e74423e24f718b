"""A row, and what rows share: contestants that could be started, closed loops in turns, comparisons."""

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from bench.asking import Contestant, Group, WrongAnswerError
from bench.contestants import TRITON
from bench.figures import Figure, Outcome, Verdict, ratios
from bench.networks import eager
from bench.processes import StartError
from bench.session import Session
from unroll_client.load import Result, closed_loop

WARM_UP = 0.2
"""Seconds before each measurement."""
LATE = ("not sent", "unanswered")
"""The load generator's names for calls, or steps, with which a server did not keep up."""
DID_NOT_END = "streams that did not end"
"""Its name for streams on which such steps were still open at the end."""
ROUNDS_OF_LARGE = 2
"""Repeats with the large network, which no bar is on."""
ISSUE = "quoted: measured with the first figures of this project, on another day; `PEERS=triton` measures it here"


class Row(NamedTuple):
    """One row of the table.

    Attributes:
        key: Its name for `make bench ONLY=`.
        what: What is measured.
        measure: Fills the outcome.
    """

    key: str
    what: str
    measure: Callable[[Session, Outcome], Awaitable[None]]


async def contestants(
    session: Session, outcome: Outcome, names: Iterable[str], network: str, groups: Sequence[Group]
) -> dict[str, Contestant]:
    """Those that run here, their answers checked; why another does not is noted."""
    there = {}
    expected = [eager(network, group) for group in groups]
    for name in names:
        try:
            there[name] = await session.contestant(name, network, groups, expected)
        except StartError as error:
            outcome.notes.append(f"{name}: {error}")
    return there


async def closed(
    session: Session,
    asked: Iterable[Contestant],
    in_flight: int,
    beside: Mapping[str, Callable[[], Awaitable[Result]]] | None = None,
    rounds: int | None = None,
) -> dict[str, list[Result]]:
    """Closed loops, in turns, and what else takes turns with them.

    Args:
        session: The run.
        asked: The servers.
        in_flight: Calls in flight.
        beside: Other measures.
        rounds: Repeats, where not the session's.

    Raises:
        WrongAnswerError: an answer was wrong, or a call failed.
    """
    loops: dict[str, Callable[[], Awaitable[Result]]] = {
        each.name: partial(
            closed_loop, each.address, each.calls, in_flight=in_flight, seconds=session.seconds, warm_up=WARM_UP
        )
        for each in asked
    }
    results = await session.in_turns({**loops, **(beside or {})}, rounds)
    for name, repeats in results.items():
        for result in repeats:
            hold(name, result)
    return results


def take_late(result: Result) -> int:
    """Takes the calls that came too late to be sent or answered out of a result's errors; returns their number.

    That a server is slower than the load that is offered is a measurement, not a failure of it.
    """
    late = sum(result.errors.pop(reason, 0) for reason in LATE)
    if late:
        result.errors.pop(DID_NOT_END, None)
    return late


def p99_ms(result: Result, late: int, seconds: float) -> float:
    """Returns the 99th percentile of latency in milliseconds, each late call counted as the run's `seconds`."""
    return float(np.percentile(np.append(result.latencies, [seconds] * late), 99, method="higher")) * 1e3


def hold(name: str, result: Result) -> None:
    """Checks that every answer was right.

    Raises:
        WrongAnswerError: one was not, or a call failed.
    """
    if result.wrong or result.errors or not result.calls:
        problems = [f"{count} x {reason}" for reason, count in result.errors.most_common(3)]
        problems += [f"{result.wrong} wrong answers"] if result.wrong else []
        raise WrongAnswerError(f"{name}: {'; '.join(problems) or 'no answer'}")


def rates(results: dict[str, list[Result]], sequences: int) -> dict[str, list[float]]:
    """Sequences a second, one figure a round."""
    return {name: [result.rate * sequences for result in rounds] for name, rounds in results.items()}


def report(outcome: Outcome, results: dict[str, list[Result]], sequences: int, suffix: str = "") -> None:
    """Adds rate and latency of every contestant to the figures."""
    for name, samples in rates(results, sequences).items():
        outcome.figures.append(Figure(name, f"sequences/s{suffix}", samples))
    for name, rounds in results.items():
        for q in (50, 99):
            samples = [result.percentile(q) * 1e3 for result in rounds]
            outcome.figures.append(Figure(name, f"p{q} ms{suffix}", samples))


def against(
    outcome: Outcome, samples: dict[str, list[float]], ours: str, theirs: str, bar: float, unit: str = "x"
) -> None:
    """Claims that `ours` does `bar` times what `theirs` does."""
    claim = f"{ours} / {theirs}"
    missing = [name for name in (ours, theirs) if name not in samples]
    if missing:
        outcome.verdicts.append(Verdict(claim, [], bar, unit=unit, source=f"no {', no '.join(missing)} here"))
    else:
        outcome.verdicts.append(Verdict(claim, ratios(samples[ours], samples[theirs]), bar, unit=unit))


def against_triton(
    session: Session, outcome: Outcome, samples: dict[str, list[float]], ours: str, bar: float, quoted: float
) -> None:
    """Claims that `ours` does `bar` times what Triton does: here where it runs, else as quoted from elsewhere."""
    if TRITON in session.peers:
        against(outcome, samples, ours, TRITON, bar)
    else:
        against_figure(outcome, samples, ours, TRITON, quoted, bar)


def against_figure(
    outcome: Outcome, samples: dict[str, list[float]], ours: str, what: str, figure: float, bar: float
) -> None:
    """Claims that `ours` does `bar` times a figure that was measured elsewhere."""
    theirs = [value / figure for value in samples.get(ours, [])]
    outcome.verdicts.append(Verdict(f"{ours} / {what}, {figure:,.0f}/s", theirs, bar, source=ISSUE))
