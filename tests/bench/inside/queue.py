"""What a sequence costs where few or many wait. This runs in the worker process."""

import asyncio
import gc
import time
from pathlib import Path

import numpy as np

from bench.inside.engine import model, open_engine
from unroll_engine.jobs import BatchJob
from unroll_server.telemetry.metrics import Metrics

STEPS = 5
"""Of each sequence: short, so that what queueing costs shows."""
LANES = 64


def seconds_per_sequence(repository: Path, waiting: int) -> float:
    """Queues `waiting` requests of one sequence each at once, and runs them all."""
    served = model(repository, LANES)
    values = np.random.default_rng(0).standard_normal((STEPS, served.spec.input_size), dtype=np.float32)
    offsets = np.array([0, STEPS], np.int64)

    async def run() -> float:
        engine = open_engine(served, LANES, Metrics())
        try:
            await engine.run(BatchJob(served, values, offsets))
            batches = [BatchJob(served, values, offsets) for _ in range(waiting)]
            last = asyncio.Event()
            ended = iter(range(1, waiting + 1))
            for batch in batches:
                batch.on_end = lambda: last.set() if next(ended) == waiting else None
            gc.collect()
            # Objects that live through a run cost the collector more, the more there are; the server's live shorter.
            gc.freeze()
            begin = time.perf_counter()
            for batch in batches:
                engine.start(batch)
            await last.wait()
            taken = time.perf_counter() - begin
            for batch in batches:
                engine.end(batch)
            return taken / waiting
        finally:
            gc.unfreeze()
            engine.close()

    return asyncio.run(run())
