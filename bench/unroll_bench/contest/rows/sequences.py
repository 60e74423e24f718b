"""Ten thousand open sequences in one process, with a step of each per second."""

import asyncio
from contextlib import suppress

import numpy as np

from unroll_bench.contest.contestants import NATIVE
from unroll_bench.contest.figures import Figure, Outcome, Verdict
from unroll_bench.contest.processes import Server, StartError
from unroll_bench.contest.rows.row import Row, hold, take_late
from unroll_bench.contest.rows.streaming import feed
from unroll_bench.contest.session import Session

SEQUENCES, STREAMS, CADENCE = 10_000, 10, 1.0
SECONDS = 17.0
"""Seconds of warm-up: long enough to fill each sequence's replay window."""
BYTES = 2048


async def measure(session: Session, outcome: Outcome) -> None:
    """Measures a fresh server, so that its memory before the sequences is known."""
    try:
        async with session.fresh_server(NATIVE) as server:
            await _measure(outcome, server)
    except StartError as error:
        outcome.notes.append(f"{NATIVE}: {error}")
    outcome.notes.append(f"{STREAMS} streams; memory is the proportional share (PSS) of all the server's processes")


async def _measure(outcome: Outcome, server: Server) -> None:
    hold(NATIVE, await feed(server.address, 100, STREAMS, CADENCE, 1.0, CADENCE))
    before = server.resident
    held: list[int] = []
    watcher = asyncio.create_task(_watch(server, held))
    result = await feed(server.address, SEQUENCES, STREAMS, CADENCE, SECONDS, CADENCE)
    watcher.cancel()
    with suppress(asyncio.CancelledError):
        await watcher
    late = take_late(result)
    if late:
        outcome.notes.append(f"{NATIVE}: {late:,} steps not answered ten seconds after the last was sent")
    hold(NATIVE, result)
    in_time = np.count_nonzero(result.latencies <= CADENCE) / (len(result.latencies) + late)
    idle = (held[-1] - before) / SEQUENCES
    outcome.figures += [
        Figure(NATIVE, "steps/s", [result.rate]),
        Figure(NATIVE, "p50 ms", [result.percentile(50) * 1e3]),
        Figure(NATIVE, "p99 ms", [result.percentile(99) * 1e3]),
        Figure(NATIVE, "bytes a sequence", [idle]),
    ]
    outcome.verdicts += [
        Verdict(f"{NATIVE}: steps answered before the sequence's next one", [in_time], 0.99, unit="%"),
        Verdict(f"{NATIVE}: memory of a sequence between its steps", [idle], BYTES, at_least=False, unit="bytes"),
    ]


async def _watch(server: Server, held: list[int]) -> None:
    """Records the server's memory twice a second."""
    while True:
        await asyncio.sleep(0.5)
        held.append(server.resident)


ROW = Row("sequences", "10,000 open sequences in one process, a step each second, on one core", measure)
