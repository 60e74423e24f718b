"""Unary calls in a closed loop (a fixed number in flight) and in an open loop (arrivals at a rate)."""

import asyncio
import math
from collections.abc import Sequence
from time import perf_counter

import numpy as np

from unroll_bench.load.pool import Peer
from unroll_bench.load.result import Call, Result, Tally
from unroll_bench.load.running import ClosedRun, OpenRun, quiet
from unroll_bench.load.schedule import on_schedule


async def closed_loop(
    address: str | Peer,
    calls: Sequence[Call],
    *,
    in_flight: int,
    seconds: float,
    warm_up: float = 0.5,
    connections: int = 1,
    tally: Tally | None = None,
) -> Result:
    """Keeps `in_flight` calls in flight: each answer starts the next call.

    Args:
        address: The server: HOST:PORT, or a `Peer`.
        calls: Calls to make in order, repeated from the first.
        in_flight: Calls in flight, spread over the connections.
        seconds: Length of the measured window; calls answered within it are measured.
        warm_up: Seconds before the window.
        connections: TCP connections.
        tally: Counters that are filled during the run.

    Returns:
        Latencies from the sending. A slow answer delays its caller's next call; `open_loop` avoids that bias.

    Raises:
        OSError: the server can't be reached at the start; later failures are counted as errors.
        ValueError: an argument is invalid.
    """
    if in_flight < 1:
        raise ValueError(f"in_flight: {in_flight}, 1 or more expected")
    run = ClosedRun(address, calls, connections, tally, seconds)
    try:
        with quiet():
            await run.pool.open()
            for index in range(in_flight):
                run.add(index % connections)
            await asyncio.sleep(warm_up)
            run.tally.begin = perf_counter()
            run.tally.end = run.tally.begin + seconds
            await asyncio.sleep(seconds)
            await run.finish()
    finally:
        await run.close()
    return run.result(seconds)


async def open_loop(
    address: str | Peer,
    calls: Sequence[Call],
    *,
    rate: float,
    seconds: float,
    warm_up: float = 0.5,
    connections: int = 1,
    seed: int = 0,
    max_in_flight: int = 10_000,
    most_late: float = math.inf,
    tally: Tally | None = None,
) -> Result:
    """Makes calls at random moments, `rate` per second on average (Poisson arrivals), however slow the answers are.

    Latencies count from the intended start of a call, so that waiting is not omitted. A call that has
    to wait for one of `max_in_flight` places waits on its own clock; one that still waits when the window ends is the
    error "not sent". Where the gaps are short this keeps a core busy, for exact timing.

    Args:
        address: The server: HOST:PORT, or a `Peer`.
        calls: Calls to make in order, repeated from the first.
        rate: Calls per second.
        seconds: Length of the measured window; calls meant to begin within it are measured.
        warm_up: Seconds before it.
        connections: TCP connections, taken in turn.
        seed: Of the arrivals.
        max_in_flight: Most calls that wait for an answer.
        most_late: Seconds after which a call that this process was too busy to make is left out: the error "left out".
            Random arrivals with some left out are random arrivals at a lower rate.
        tally: Filled meanwhile, to be looked at.

    Returns:
        Latencies from the intended beginning; `seconds` lasts until the last measured answer, so that `rate` is what
        the server did.

    Raises:
        OSError: the server can't be reached at the start; later failures are counted as errors.
        ValueError: an argument is invalid.
    """
    if rate <= 0 or max_in_flight < 1:
        raise ValueError("rate, max_in_flight: more than 0 expected")
    run = OpenRun(address, calls, connections, tally, seconds, max_in_flight, most_late)
    # The count of a Poisson process varies by its square root: enough gaps, then cut.
    generator = np.random.default_rng(seed)
    expected = rate * (warm_up + seconds)
    arrivals = np.cumsum(generator.exponential(1 / rate, int(expected + 10 * expected**0.5 + 10)))
    try:
        with quiet():
            await run.pool.open()
            origin = perf_counter()
            run.tally.begin = origin + warm_up
            run.tally.end = run.tally.begin + seconds
            await on_schedule(iter((origin + arrivals[arrivals < warm_up + seconds]).tolist()), run.arrive)
            await asyncio.sleep(run.tally.end - perf_counter())
            if run.backlog:
                run.tally.errors["not sent"] += len(run.backlog)
            await run.finish()
    finally:
        await run.close()
    return run.result(max(run.tally.end, run.tally.last) - run.tally.begin)
