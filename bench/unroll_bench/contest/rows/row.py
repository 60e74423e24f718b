"""Base of the rows: closed loops in turns, late calls, comparisons."""

from collections.abc import Awaitable, Callable, Iterable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from unroll_bench.contest.asking import Contestant
from unroll_bench.contest.figures import Outcome, Verdict, ratios
from unroll_bench.contest.network import WrongAnswerError
from unroll_bench.contest.session import Session
from unroll_bench.load import Result, closed_loop
from unroll_engine.models.spec import Float32Array

WARM_UP = 0.2
"""Seconds before each measurement."""
LATE = ("not sent", "unanswered")
"""Error names of the load generator for calls or steps that a server did not keep up with."""
DID_NOT_END = "streams that did not end"
"""Its error name for streams on which such steps were open at the end."""


class Row(NamedTuple):
    """One row of the table.

    Attributes:
        key: Its name for `make bench ONLY=`.
        what: Description of the measurement.
        measure: Fills the outcome.
    """

    key: str
    what: str
    measure: Callable[[Session, Outcome], Awaitable[None]]


def grouped(sequences: list[Float32Array], size: int) -> list[list[Float32Array]]:
    """Cuts a list into requests of `size` sequences."""
    return [sequences[start : start + size] for start in range(0, len(sequences), size)]


async def closed(session: Session, asked: Iterable[Contestant], in_flight: int) -> dict[str, list[Result]]:
    """Runs closed loops, in turns.

    Raises:
        WrongAnswerError: an answer was wrong, or a call failed.
    """
    results = await session.in_turns(
        {
            each.name: partial(
                closed_loop, each.address, each.calls, in_flight=in_flight, seconds=session.seconds, warm_up=WARM_UP
            )
            for each in asked
        }
    )
    for name, rounds in results.items():
        for result in rounds:
            hold(name, result)
    return results


def take_late(result: Result) -> int:
    """Removes the calls that were not sent or answered in time from a result's errors; returns their number.

    A server that is slower than the offered load is a result, not a failure of the measurement.
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


def against(
    outcome: Outcome,
    samples: dict[str, list[float]],
    ours: str,
    theirs: str,
    bar: float,
    *,
    of: str = "",
    at_least: bool = True,
) -> None:
    """Claims that `ours` reaches `bar` times `theirs`; `of` names the figure if a row has several."""
    missing = [name for name in (ours, theirs) if name not in samples]
    found: Sequence[float] = [] if missing else ratios(samples[ours], samples[theirs])
    why = f"no {', no '.join(missing)} here" if missing else ""
    outcome.verdicts.append(Verdict(f"{ours} / {theirs}{of}", found, bar, at_least=at_least, missing=why))
