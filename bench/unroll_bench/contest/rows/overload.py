"""Five times the load that a server can carry: the share of its peak that is answered in time."""

from functools import partial
from itertools import count

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
CONNECTIONS, CALLS = 100, 1000
"""Connections, and the calls that each may have in flight: a call never waits for another to leave."""
MOST_LATE = 0.02
"""Seconds after which a call that the generator was too busy to make is left out."""
WARM_UP = 1.0
"""Seconds until the queue has its full length."""
KINDS = ((64, 8, 8, 0.9), (1, 256, 64, 0.5))
"""Sequences of a request, distinct requests, requests in flight for the peak, bar."""


async def measure(session: Session, outcome: Outcome) -> None:
    """Measures our peaks by a closed loop, then Poisson arrivals; batches, and single sequences."""
    for sequences, requests, in_flight, bar in KINDS:
        names = [NATIVE, *(session.peers & {TRITON} if sequences == 1 else ())]
        there = await session.contestants(outcome, names, grouped(even(sequences * requests), sequences))
        if NATIVE not in there:
            continue
        peak = max(result.rate for result in (await closed(session, [there[NATIVE]], in_flight))[NATIVE])
        suffix = f", {sequences} sequences a request"
        measured = await session.in_turns(
            {name: partial(_overloaded, session, each, TIMES * peak, count()) for name, each in there.items()}
        )
        gone = [name for name, rounds in measured.items() if None in rounds]
        outcome.notes += [f"{name}{suffix}: the server is gone" for name in gone]
        results = {name: [each for each in rounds if each] for name, rounds in measured.items() if name not in gone}
        if NATIVE in gone:
            outcome.problem = f"{NATIVE}{suffix}: the server is gone"
            return
        good = {
            name: [sum(result.latencies <= TIMEOUT) / session.seconds for result in rounds]
            for name, rounds in results.items()
        }
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
        claim = f"{NATIVE}, good output at {TIMES} x peak / peak{suffix}"
        outcome.verdicts.append(Verdict(claim, [rate / peak for rate in good[NATIVE]], bar, unit="%"))
        if sequences == 1:
            against(outcome, good, NATIVE, TRITON, 2, of=", good output")
    outcome.notes.append(f"good: answered within {TIMEOUT:g} s of the moment when the request should have left")


async def _overloaded(session: Session, contestant: Contestant, rate: float, seeds: "count[int]") -> Result | None:
    peer = Peer(contestant.address, timeout=TIMEOUT)
    run = open_loop(
        peer,
        contestant.calls,
        rate=rate,
        seconds=session.seconds,
        warm_up=WARM_UP,
        seed=next(seeds),
        connections=CONNECTIONS,
        max_in_flight=CONNECTIONS * CALLS,
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
