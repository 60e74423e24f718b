"""The engine in process against onnxruntime alone: the cost of scheduling and the gain of the kernel.

`ragged_steps` and `alone_steps` run in the worker process.
"""

import asyncio
import time
from functools import cache, partial
from itertools import cycle
from pathlib import Path

import numpy as np

from unroll_bench.contest.contestants import FEATURES, HIDDEN, MODEL
from unroll_bench.contest.figures import Figure, Outcome, Verdict, ratios
from unroll_bench.contest.network import eager, hold, ragged
from unroll_bench.contest.rows.row import Row, grouped
from unroll_bench.contest.session import Session
from unroll_engine.async_engine import AsyncEngine
from unroll_engine.bundle import find_bundles, verify
from unroll_engine.jobs import BatchJob
from unroll_engine.models.loader import Loader, Model
from unroll_engine.runtimes.onnx import OnnxCpuRuntime
from unroll_proto import bundle

LANES = 64
ENGINE = "engine in process"
ALONE = "onnxruntime alone"
TICK_STEPS = 32
"""Default of `unroll-serve`."""
WARM_UP = 0.2
SEQUENCES = 232
"""Sequences of 5 to 120 steps: each length twice, in four batches."""
IN_FLIGHT = 8
"""Batches in flight: enough that lanes never wait for sequences."""
ALONE_STEPS = (16, 64)
"""Steps of one run of onnxruntime alone; the faster one counts."""


@cache
def _model(repository: Path) -> Model:
    """Loads the one model of a repository, as the server does."""
    (key,) = find_bundles(repository).bundles
    return Loader("auto", "cpu", LANES).load(verify(repository, key))


def ragged_steps(repository: Path, seconds: float) -> float:
    """Measures timesteps per second of sequences of 5 to 120 steps, with enough of them to fill every lane.

    Raises:
        WrongAnswerError: an answer differs from eager PyTorch's.
    """
    return asyncio.run(_drive(_model(repository), seconds))


async def _drive(model: Model, seconds: float) -> float:
    groups = grouped(ragged(SEQUENCES), SEQUENCES // 4)
    batches = [(np.concatenate(group), np.cumsum([0, *map(len, group)], dtype=np.int64)) for group in groups]
    engine = AsyncEngine([model], max_lanes=LANES, tick_steps=TICK_STEPS, max_queued_steps=2**40)
    try:
        for group, batch in zip(groups, batches, strict=True):
            job = BatchJob(model, *batch)
            await engine.run(job)
            hold(ENGINE, job.logits, eager(group))
        begin = time.perf_counter() + WARM_UP
        turns, done = cycle(batches), 0

        async def caller() -> None:
            nonlocal done
            while time.perf_counter() < begin + seconds:
                values, offsets = next(turns)
                await engine.run(BatchJob(model, values, offsets))
                if begin <= time.perf_counter() < begin + seconds:
                    done += len(values)

        await asyncio.gather(*(caller() for _ in range(IN_FLIGHT)))
    finally:
        engine.close()
    return done / seconds


def alone_steps(repository: Path, seconds: float) -> float:
    """Measures timesteps per second of onnxruntime on the Scan form: full lanes, equal lengths, no gathering."""
    runtime = OnnxCpuRuntime((repository / MODEL / "1" / bundle.ONNX_RNN).read_bytes())
    return max(_alone(runtime, steps, seconds / len(ALONE_STEPS)) for steps in ALONE_STEPS)


def _alone(runtime: OnnxCpuRuntime, steps: int, seconds: float) -> float:
    x = np.random.default_rng(0).standard_normal((steps, LANES, FEATURES), dtype=np.float32)
    state = runtime.run(x, (np.zeros((1, LANES, HIDDEN), np.float32),)).final_state
    runs = 0
    begin = time.perf_counter()
    while (took := time.perf_counter() - begin) < seconds:
        state = runtime.run(x, state).final_state
        runs += 1
    return runs * steps * LANES / took


async def measure(session: Session, outcome: Outcome) -> None:
    """Measures both in the worker process, in turns."""
    repository = await session.repository()
    rates = await session.in_turns(
        {
            ENGINE: partial(session.inside, ragged_steps, repository, session.seconds),
            ALONE: partial(session.inside, alone_steps, repository, session.seconds),
        }
    )
    outcome.figures += [Figure(name, "steps/s of sequences", samples) for name, samples in rates.items()]
    outcome.verdicts.append(Verdict(f"{ENGINE} / {ALONE}", ratios(rates[ENGINE], rates[ALONE]), 1.25))


ROW = Row("engine", "engine in process, lengths 5..120, 64 lanes, hidden 128, steps/s", measure)
