"""Ten thousand open sequences in one process, a step of each every second."""

import asyncio
from contextlib import suppress

import numpy as np

from bench.contestants import ENVOY, GRPCIO
from bench.figures import Figure, Outcome, Verdict
from bench.networks import SMALL
from bench.processes import Server, StartError
from bench.rows import streaming
from bench.rows.row import Row, hold, take_late
from bench.session import Session
from unroll_client.load import Result, stream_loop

SEQUENCES, STREAMS, CADENCE = 10_000, 10, 1.0
SECONDS = {ENVOY: 17.0, GRPCIO: 4.0}
"""The longer run fills each sequence's history of chunks that can be sent again."""
BYTES = 4096


async def measure(session: Session, outcome: Outcome) -> None:
    """A fresh server, so that its memory before the sequences is known."""
    for front, seconds in SECONDS.items():
        try:
            async with session.fresh_server(front, SMALL) as server:
                await _measure(outcome, front, server, seconds)
        except StartError as error:
            outcome.notes.append(f"{front}: {error}")
    outcome.notes.append(f"{STREAMS} streams; memory is the proportional share (PSS) of all the server's processes")


async def _measure(outcome: Outcome, front: str, server: Server, seconds: float) -> None:
    hold(front, await _run(server, 100, 1.0))
    before = server.resident
    held: list[int] = []
    watcher = asyncio.create_task(_watch(server, held))
    result = await _run(server, SEQUENCES, seconds)
    watcher.cancel()
    with suppress(asyncio.CancelledError):
        await watcher
    late = take_late(result)
    if late:
        outcome.notes.append(f"{front}: {late:,} steps not answered ten seconds after the last was sent")
    hold(front, result)
    in_time = np.count_nonzero(result.latencies <= CADENCE) / (len(result.latencies) + late)
    idle = (held[-1] - before) / SEQUENCES
    outcome.figures += [
        Figure(front, "steps/s", [result.rate]),
        Figure(front, "p50 ms", [result.percentile(50) * 1e3]),
        Figure(front, "p99 ms", [result.percentile(99) * 1e3]),
        Figure(front, "bytes a sequence", [idle]),
    ]
    outcome.verdicts += [
        Verdict(f"{front}: steps answered before the sequence's next one", [in_time], 0.99, unit="%"),
        Verdict(f"{front}: memory of a sequence between its steps", [idle], BYTES, at_least=False, unit="bytes"),
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
