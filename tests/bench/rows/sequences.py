"""Ten thousand open sequences in one process, a step of each every second."""

import asyncio
from contextlib import suppress

import numpy as np

from bench.contestants import OURS
from bench.figures import Figure, Outcome, Verdict
from bench.networks import SMALL
from bench.processes import Server, StartError
from bench.rows import streaming
from bench.rows.row import Row, hold, take_late
from bench.session import Session
from unroll_client.load import Result, stream_loop

SEQUENCES, STREAMS, CADENCE = 10_000, 10, 1.0
SECONDS = 17.0
"""Long enough to fill each sequence's history of chunks that can be sent again."""
BYTES = 4096


async def measure(session: Session, outcome: Outcome) -> None:
    """A fresh server, so that its memory before the sequences is known."""
    for ours in OURS:
        try:
            async with session.fresh_server(ours, SMALL) as server:
                await _measure(outcome, ours, server)
        except StartError as error:
            outcome.notes.append(f"{ours}: {error}")
    outcome.notes.append(f"{STREAMS} streams; memory is the proportional share (PSS) of all the server's processes")


async def _measure(outcome: Outcome, ours: str, server: Server) -> None:
    hold(ours, await _run(server, 100, 1.0))
    before = server.resident
    held: list[int] = []
    watcher = asyncio.create_task(_watch(server, held))
    result = await _run(server, SEQUENCES, SECONDS)
    watcher.cancel()
    with suppress(asyncio.CancelledError):
        await watcher
    late = take_late(result)
    if late:
        outcome.notes.append(f"{ours}: {late:,} steps not answered ten seconds after the last was sent")
    hold(ours, result)
    in_time = np.count_nonzero(result.latencies <= CADENCE) / (len(result.latencies) + late)
    idle = (held[-1] - before) / SEQUENCES
    outcome.figures += [
        Figure(ours, "steps/s", [result.rate]),
        Figure(ours, "p50 ms", [result.percentile(50) * 1e3]),
        Figure(ours, "p99 ms", [result.percentile(99) * 1e3]),
        Figure(ours, "bytes a sequence", [idle]),
    ]
    outcome.verdicts += [
        Verdict(f"{ours}: steps answered before the sequence's next one", [in_time], 0.99, unit="%"),
        Verdict(f"{ours}: memory of a sequence between its steps", [idle], BYTES, at_least=False, unit="bytes"),
    ]


async def _run(server: Server, sequences: int, seconds: float) -> Result:
    return await stream_loop(
        server.address,
        sequences=sequences,
        streams=STREAMS,
        cadence=CADENCE,
        chunk_steps=1,
        seconds=seconds,
        warm_up=CADENCE,
        model=SMALL,
        values=streaming.values(SMALL),
        check=streaming.state_check(SMALL),
    )


async def _watch(server: Server, held: list[int]) -> None:
    """Notes the server's memory twice a second."""
    while True:
        await asyncio.sleep(0.5)
        held.append(server.resident)


ROW = Row("sequences", "10,000 open sequences in one process, a step each second, on one core", measure)
