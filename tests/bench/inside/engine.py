"""Our engine without gRPC, and onnxruntime without our engine. These run in the worker process."""

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import cycle
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnxruntime
from support.eager import TOLERANCE

from bench.asking import WrongAnswerError
from bench.networks import eager, even, ragged
from unroll_client.load import Result
from unroll_engine.async_engine import AsyncEngine
from unroll_engine.bundle import find_bundles, verify
from unroll_engine.jobs import BatchJob
from unroll_engine.models.loader import Loader, Model
from unroll_engine.models.spec import Float32Array, ModelSpec
from unroll_engine.runtimes.onnx import session_options
from unroll_proto import bundle
from unroll_server.telemetry.metrics import Metrics

TICK_STEPS = 32
"""As `unroll-serve` has it by default."""
WARM_UP = 0.2
SEQUENCES = 232
"""Of 5 to 120 steps: each length twice, in four batches."""
IN_FLIGHT = 8
"""Of those batches: enough that lanes never wait for sequences."""
ALONE_STEPS = (16, 64)
"""Steps of one run of onnxruntime alone; the faster one counts."""


class _Question(NamedTuple):
    """The sequences of a batch, and what eager PyTorch says of them."""

    group: Sequence[Float32Array]
    expected: Float32Array


@cache
def _even(name: str, count: int) -> list[_Question]:
    group = even(name, count)
    return [_Question(group, eager(name, group))]


@cache
def _ragged(name: str) -> list[_Question]:
    values = ragged(name, SEQUENCES)
    groups = [values[start : start + SEQUENCES // 4] for start in range(0, SEQUENCES, SEQUENCES // 4)]
    return [_Question(group, eager(name, group)) for group in groups]


@cache
def model(repository: Path, lanes: int) -> Model:
    """The one model of a repository, as the server loads it."""
    (key,) = find_bundles(repository).bundles
    return Loader("auto", "cpu", lanes).load(verify(repository, key))


def even_batches(repository: Path, lanes: int, in_flight: int, seconds: float) -> Result:
    """Batches of `lanes` sequences of 29 steps, `in_flight` at a time; calls are batches."""
    served = model(repository, lanes)
    return asyncio.run(_drive(served, lanes, _even(served.spec.key.name, lanes), in_flight, seconds, Metrics()))


def ragged_steps(repository: Path, lanes: int, seconds: float) -> tuple[float, float]:
    """Sequences of 5 to 120 steps, always enough of them to fill every lane.

    Returns:
        Timesteps a second that belonged to sequences; and all that were computed, with the padding to ticks' ends.
    """
    served = model(repository, lanes)
    questions = _ragged(served.spec.key.name)
    metrics = Metrics()
    result = asyncio.run(_drive(served, lanes, questions, IN_FLIGHT, seconds, metrics))
    real, computed = (_steps(metrics, kind) for kind in ("real", "computed"))
    # Every group has its share of the answers, so the steps answered are those of the sequences answered.
    steps = sum(len(sequence) for question in questions for sequence in question.group)
    rate = result.calls * steps / len(questions) / result.seconds
    return rate, rate * computed / real


def alone_steps(repository: Path, lanes: int, seconds: float) -> tuple[float, float]:
    """Timesteps a second of onnxruntime on the Scan form: every lane full, lengths equal, nothing gathered. Twice."""
    spec = model(repository, lanes).spec
    folder = repository / spec.key.name / str(spec.key.version)
    session = onnxruntime.InferenceSession(
        (folder / bundle.ONNX_SCAN).read_bytes(), session_options(), providers=["CPUExecutionProvider"]
    )
    best = max(_alone(session, spec, lanes, steps, seconds / len(ALONE_STEPS)) for steps in ALONE_STEPS)
    return best, best


def _alone(session: onnxruntime.InferenceSession, spec: ModelSpec, lanes: int, steps: int, seconds: float) -> float:
    x = np.random.default_rng(0).standard_normal((steps, lanes, spec.input_size), dtype=np.float32)
    (state,) = spec.zero_state(lanes)
    feeds = {"input": x, "initial_state": state}
    session.run(None, feeds)
    runs = 0
    begin = time.perf_counter()
    while (took := time.perf_counter() - begin) < seconds:
        feeds["initial_state"] = session.run(["logits", "states", "final_state"], feeds)[2]
        runs += 1
    return runs * steps * lanes / took


async def _drive(
    served: Model,
    lanes: int,
    questions: Sequence[_Question],
    in_flight: int,
    seconds: float,
    metrics: Metrics,
) -> Result:
    """Checks every answer against eager PyTorch, then keeps `in_flight` batches in the engine."""
    engine = open_engine(served, lanes, metrics)
    try:
        batches = [_batch_maker(served, question.group) for question in questions]
        for make, question in zip(batches, questions, strict=True):
            batch = make()
            await engine.run(batch)
            if not np.abs(batch.logits - question.expected).max() <= TOLERANCE:
                raise WrongAnswerError("our engine without gRPC: not what eager PyTorch computes")
        begin = time.perf_counter() + WARM_UP
        latencies: list[float] = []
        turns = cycle(batches)
        callers = [_caller(engine, turns, begin, begin + seconds, latencies) for _ in range(in_flight)]
        await asyncio.gather(*callers)
    finally:
        engine.close()
    return Result(np.array(latencies), seconds, len(latencies), Counter(), 0, 0, 0)


async def _caller(
    engine: AsyncEngine, turns: Iterator[Callable[[], BatchJob]], begin: float, end: float, latencies: list[float]
) -> None:
    while (started := time.perf_counter()) < end:
        await engine.run(next(turns)())
        if begin <= (now := time.perf_counter()) < end:
            latencies.append(now - started)


def open_engine(served: Model, lanes: int, metrics: Metrics) -> AsyncEngine:
    """The engine with the server's defaults, and room for any queue."""
    return AsyncEngine([served], max_lanes=lanes, tick_steps=TICK_STEPS, max_queued_steps=2**40, metrics=metrics)


def _batch_maker(served: Model, group: Sequence[Float32Array]) -> Callable[[], BatchJob]:
    values = np.concatenate(group)
    offsets = np.cumsum([0, *map(len, group)], dtype=np.int64)
    return lambda: BatchJob(served, values, offsets)


def _steps(metrics: Metrics, kind: str) -> float:
    for family in metrics.collect():
        for sample in family.samples:
            if sample.name == "unroll_steps_total" and sample.labels["kind"] == kind:
                return sample.value
    raise LookupError(f"no unroll_steps_total of kind {kind}")
