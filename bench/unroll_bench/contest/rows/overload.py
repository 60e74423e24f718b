"""Five times the load that a server can carry: the share of its peak that is answered in time."""

from functools import partial
from itertools import count
from typing import NamedTuple

from unroll_bench.contest.asking import Contestant
from unroll_bench.contest.contestants import NATIVE, TRITON
from unroll_bench.contest.figures import Figure, Outcome, Verdict
from unroll_bench.contest.network import even
from unroll_bench.contest.rows.row import Row, against, closed, grouped
from unroll_bench.contest.session import Session
from unroll_bench.load import Peer, Result, open_loop

TIMES = 5
TIMEOUT = 1.0
"""Seconds to each call's deadline: what comes later is no good."""
IN_FLIGHT = 100_000
"""Most calls in flight, over all connections: a call never waits for another to leave."""
MOST_LATE = 0.02
"""Seconds after which a call that the generator was too busy to make is left out."""
LEAST = 1.0
"""Requests per second that are counted for a server that answers none in time, so that it can be compared."""
WARM_UP = 1.0
"""Seconds until the queue has its full length."""


class Kind(NamedTuple):
    """One kind of load.

    Attributes:
        sequences: Sequences of a request.
        requests: Distinct requests.
        in_flight: Requests in flight for the peak.
        connections: Connections under overload.
        bar: Least share of the peak; None to compare with Triton instead.
    """

    sequences: int
    requests: int
    in_flight: int
    connections: int
    bar: float | None


KINDS = (Kind(64, 8, 8, 100, 0.9), Kind(1, 256, 64, 100, 0.5), Kind(1, 256, 64, 10, None))
"""Triton's process often ends by a segmentation fault when so many calls expire; less often with 10 connections."""


async def measure(session: Session, outcome: Outcome) -> None:
    """Measures our peaks by a closed loop, then Poisson arrivals; batches, and single sequences."""
    for kind in KINDS:
        sequences, names = kind.sequences, [NATIVE]
        if kind.bar is None:
            if TRITON not in session.peers:
                against(outcome, {}, NATIVE, TRITON, 2, of=", good output")
                continue
            names.append(TRITON)
        there = await session.contestants(outcome, names, grouped(even(sequences * kind.requests), sequences))
        if NATIVE not in there:
            continue
        # With a peer, five times what the weaker one can carry overloads both.
        peaks = await closed(session, list(there.values()), kind.in_flight)
        peak = min(max(result.rate for result in rounds) for rounds in peaks.values())
        suffix = f", {sequences} sequences a request" + ("" if kind.bar else f", {kind.connections} connections")
        measured = await session.in_turns(
            {
                name: partial(_overloaded, session, each, TIMES * peak, kind.connections, count())
                for name, each in there.items()
            }
        )
        gone = [name for name, rounds in measured.items() if None in rounds]
        outcome.notes += [f"{name}{suffix}: the server is gone" for name in gone]
        finished = {name: [each for each in rounds if each] for name, rounds in measured.items()}
        results = {name: rounds for name, rounds in finished.items() if rounds}
        if NATIVE in gone:
            outcome.problem = f"{NATIVE}{suffix}: the server is gone"
            return
        good = {name: [_good(each, session.seconds) for each in rounds] for name, rounds in measured.items()}
        for name, rounds in results.items():
            left_out = sum(result.errors.pop("left out", 0) for result in rounds)
            offered = TIMES * peak - left_out / len(rounds) / (WARM_UP + session.seconds)
            outcome.notes.append(
                f"{name}{suffix}: offered {offered:,.0f} requests/s, as many as the generator can make"
            )
        outcome.figures.append(Figure(NATIVE, f"requests/s, peak{suffix}", [peak]))
        for name, rounds in results.items():
            outcome.figures.append(Figure(name, f"requests/s in time at {TIMES} x peak{suffix}", good[name]))
            _explain(outcome, f"{name}{suffix}", rounds)
        if kind.bar is None:
            against(outcome, good, NATIVE, TRITON, 2, of=", good output")
        else:
            claim = f"{NATIVE}, good output at {TIMES} x peak / peak{suffix}"
            outcome.verdicts.append(Verdict(claim, [rate / peak for rate in good[NATIVE]], kind.bar, unit="%"))
    outcome.notes.append(f"good: answered within {TIMEOUT:g} s of the moment when the request should have left")


def _good(result: Result | None, seconds: float) -> float:
    """Returns the requests per second that were answered in time, LEAST at least; no result: the server is gone."""
    return LEAST if result is None else max(LEAST, float(sum(result.latencies <= TIMEOUT)) / seconds)


async def _overloaded(
    session: Session, contestant: Contestant, rate: float, connections: int, seeds: "count[int]"
) -> Result | None:
    peer = Peer(contestant.address, timeout=TIMEOUT)
    run = open_loop(
        peer,
        contestant.calls,
        rate=rate,
        seconds=session.seconds,
        warm_up=WARM_UP,
        seed=next(seeds),
        connections=connections,
        max_in_flight=IN_FLIGHT,
        most_late=MOST_LATE,
    )
    try:
        return await run
    except OSError:
        # It can't be reached any more.
        return None


def _explain(outcome: Outcome, name: str, results: list[Result]) -> None:
    """Notes the outcome of the other calls; a wrong answer is the row's problem."""
    if any(result.wrong for result in results):
        outcome.problem = f"{name}: wrong answers"
    errors = sum((result.errors for result in results), start=type(results[0].errors)())
    rest = "; ".join(f"{number} x {reason[:60]}" for reason, number in errors.most_common(3))
    outcome.notes.append(f"{name}: {rest or 'nothing refused'}")


ROW = Row("overload", f"good output at {TIMES} times the load it can carry, deadlines of {TIMEOUT:g} s", measure)
