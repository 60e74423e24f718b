"""Five times the load that a server can carry: how much of its peak is still answered, and in time."""

from functools import partial
from itertools import count

from bench.asking import Contestant
from bench.contestants import OURS
from bench.figures import Figure, Outcome, Verdict
from bench.networks import SMALL, even
from bench.rows.row import Row, closed, contestants
from bench.session import Session
from unroll_client.load import Peer, Result, open_loop

TIMES = 5
TIMEOUT = 1.0
"""Seconds to each call's deadline: what comes later is no good."""
WARM_UP = 1.0
"""Seconds until the queue is as long as it gets."""
KINDS = ((64, 8, 8), (1, 256, 64))
"""Sequences of a request, distinct requests, requests in flight for the peak."""


async def measure(session: Session, outcome: Outcome) -> None:
    """Peaks by a closed loop, then Poisson arrivals; batches, and single sequences."""
    for sequences, requests, in_flight in KINDS:
        values = even(SMALL, sequences * requests)
        groups = [values[start : start + sequences] for start in range(0, len(values), sequences)]
        there = await contestants(session, outcome, OURS, SMALL, groups)
        peaks = await closed(session, there.values(), in_flight)
        suffix = f", {sequences} sequences a request"
        for name, each in there.items():
            peak = max(result.rate for result in peaks[name])
            over = partial(_overloaded, session, each, TIMES * peak, count())
            results = (await session.in_turns({name: over}))[name]
            good = [sum(result.latencies <= TIMEOUT) / session.seconds for result in results]
            outcome.figures.append(Figure(name, f"requests/s, peak{suffix}", [peak]))
            outcome.figures.append(Figure(name, f"requests/s in time at {TIMES} x peak{suffix}", good))
            claim = f"{name}, good output at {TIMES} x peak / peak{suffix}"
            outcome.verdicts.append(Verdict(claim, [rate / peak for rate in good], 0.9, unit="%"))
            _explain(outcome, f"{name}{suffix}", results)
    outcome.notes.append(f"good: answered within {TIMEOUT:g} s of the moment when the request should have left")


async def _overloaded(session: Session, contestant: Contestant, rate: float, seeds: "count[int]") -> Result:
    peer = Peer(contestant.address, timeout=TIMEOUT)
    return await open_loop(
        peer, contestant.calls, rate=rate, seconds=session.seconds, warm_up=WARM_UP, seed=next(seeds)
    )


def _explain(outcome: Outcome, name: str, results: list[Result]) -> None:
    """Notes what became of the rest; a wrong answer is more than that."""
    if any(result.wrong for result in results):
        outcome.problem = f"{name}: wrong answers"
    errors = sum((result.errors for result in results), start=type(results[0].errors)())
    rest = "; ".join(f"{number} x {reason[:60]}" for reason, number in errors.most_common(3))
    outcome.notes.append(f"{name}: {rest or 'nothing refused'}")


ROW = Row("overload", f"good output at {TIMES} times the load it can carry, deadlines of {TIMEOUT:g} s", measure)
