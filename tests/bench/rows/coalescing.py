"""A thousand concurrent callers of AsyncClient.classify, together and each with an RPC of its own."""

import asyncio
import time
from functools import partial

import numpy as np
from support.eager import TOLERANCE

from bench.asking import WrongAnswerError
from bench.contestants import OURS
from bench.figures import Figure, Outcome, Verdict, ratios
from bench.networks import SMALL, eager, even
from bench.processes import StartError
from bench.rows.row import Row
from bench.session import Session
from unroll_client import AsyncClient
from unroll_engine.models.spec import Float32Array

CALLERS = 1_000


async def measure(session: Session, outcome: Outcome) -> None:
    """The same callers on the same server, with and without coalescing, in turns."""
    sequences = even(SMALL, CALLERS)
    expected = eager(SMALL, sequences)
    for ours in OURS:
        try:
            server = await session.server(ours, SMALL)
        except StartError as error:
            outcome.notes.append(f"{ours}: {error}")
            continue
        calls = partial(_calls_per_second, server.address, sequences, expected, session.seconds)
        results = await session.in_turns({"together": partial(calls, True), "one RPC each": partial(calls, False)})
        for how, samples in results.items():
            outcome.figures.append(Figure(f"{CALLERS:,} callers, {how}, {ours}", "calls/s", samples))
        ratio = ratios(results["together"], results["one RPC each"])
        outcome.verdicts.append(Verdict(f"together / one RPC each, {ours}", ratio, 5))


async def _calls_per_second(
    address: str, sequences: list[Float32Array], expected: Float32Array, seconds: float, coalesce: bool
) -> float:
    """Each caller asks for its sequence, and again when it has the answer."""
    async with AsyncClient(address, model=SMALL, coalesce=coalesce) as client:
        for sequence, logits in zip(sequences[:3], expected, strict=False):
            answer = await client.classify([sequence])
            if np.abs(answer.logits - logits).max() > TOLERANCE:
                raise WrongAnswerError("AsyncClient.classify: not what eager PyTorch computes")
        done = 0
        begin = time.perf_counter()

        async def caller(index: int) -> None:
            nonlocal done
            while time.perf_counter() < begin + seconds:
                answer = await client.classify([sequences[index]])
                if np.abs(answer.logits[0] - expected[index]).max() > TOLERANCE:
                    raise WrongAnswerError("AsyncClient.classify: another caller's answer")
                done += 1

        async with asyncio.TaskGroup() as callers:
            for index in range(len(sequences)):
                callers.create_task(caller(index))
        return done / (time.perf_counter() - begin)


ROW = Row("coalescing", "1,000 concurrent AsyncClient.classify callers, calls/s", measure)
