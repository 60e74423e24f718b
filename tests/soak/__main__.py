"""`make soak`: runs the soak, prints a table, and fails if an answer was wrong, a step lost, or a resource leaked."""

import asyncio
import gc
import socket
import tempfile
import time
from collections.abc import Coroutine
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import Any

import click
import grpc.aio
import numpy as np
import torch
from rich.console import Console
from support.processes import ServerProcess

from soak import calls, faults, gauges, inference, streaming
from soak.ledger import Ledger, table
from soak.oracle import Oracle
from unroll_client import AsyncClient
from unroll_proto import cli

STREAMS = 20
"""Concurrent streams that outlive their servers."""
SESSIONS = 10
"""Concurrent sessions on the server that is never killed."""
POLL = 0.5
"""Seconds between the servers' scans for versions."""

torch.set_num_threads(1)


@click.command()
@click.option("--minutes", type=click.FloatRange(min=0.05), default=30.0, show_default=True, help="How long.")
@click.option("--seed", type=int, default=0, show_default=True, help="Makes what is sent, and when.")
def command(minutes: float, seed: int) -> None:
    """Mixes every kind of call with faults, against two servers, and checks the bits of every answer."""
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        problems = asyncio.run(soak(Path(folder), minutes * 60, seed))
    if problems:
        raise click.ClickException("; ".join(problems))


async def soak(folder: Path, seconds: float, seed: int) -> list[str]:
    """Runs everything for a time; returns the problems found, in a few words each."""
    oracle, ledger = Oracle(folder), Ledger()
    metrics = f"127.0.0.1:{_free_port()}"
    with ServerProcess(oracle.models, folder / "steady.log", *_options(), "--metrics", metrics) as steady:
        looking = partial(gauges.look, steady, metrics)
        samples: list[gauges.Sample] = []
        async with faults.Replica(partial(_start, oracle.models, folder / "killed.log")) as replica:
            # libuv keeps one descriptor after its first connection.
            async with AsyncClient(steady.address) as first:
                await first.models()
            start = await gauges.steady(looking)
            begin = time.monotonic()
            await _run(oracle, ledger, steady.address, replica, seed, seconds, gauges.watch(samples, looking))
            elapsed = time.monotonic() - begin
        # grpc.aio's cancelled calls are cyclic garbage, which keeps our end of a connection open until it is collected.
        gc.collect()
        end = await gauges.settled(start, looking)
        if (code := steady.stop()) != 0:
            ledger.was_wrong(f"the server ended with {code}")
    slope, bounded = gauges.growth(samples)
    figures = {
        "memory, MiB": f"{samples[0].resident >> 20} to {samples[-1].resident >> 20}",
        "slope, MiB/h": f"{slope:+.1f}",
    }
    for name, before, after in zip(gauges.HELD, start.held, end.held, strict=True):
        figures[f"{name}, before and after"] = f"{before}, {after}"
    figures["calls that the server failed"] = str(end.bugs)
    console = Console(width=100)
    console.print(table(ledger, figures, elapsed))
    for example in ledger.examples:
        console.print(example, markup=False)
    problems = {
        f"{ledger.wrong} wrong answers": ledger.wrong > 0,
        f"{ledger.lost} lost steps": ledger.lost > 0,
        "memory grows": not bounded,
        f"{end.bugs} calls that the server failed": end.bugs > 0,
        "the server holds on to something": not gauges.let_go(start, end),
    }
    return [problem for problem, holds in problems.items() if holds]


async def _run(
    oracle: Oracle,
    ledger: Ledger,
    steady: str,
    replica: faults.Replica,
    seed: int,
    seconds: float,
    watching: Coroutine[Any, Any, None],
) -> None:
    """Runs all actors for a time; the first failure ends the run."""
    seeds = iter(np.random.SeedSequence(seed).spawn(1000))

    def rng() -> np.random.Generator:
        return np.random.default_rng(next(seeds))

    async with AsyncExitStack() as stack:
        both = await stack.enter_async_context(AsyncClient([steady, replica.address]))
        one = await stack.enter_async_context(AsyncClient(steady))
        channel = await stack.enter_async_context(grpc.aio.insecure_channel(steady))
        actors: list[Coroutine[Any, Any, None]] = [
            watching,
            *(calls.classify(both, oracle, ledger, rng(), 3) for _ in range(4)),
            calls.classify(one, oracle, ledger, rng(), 100),
            calls.cancel(channel, ledger, rng()),
            calls.bad_input(channel, ledger, rng()),
            *(streaming.stream(both, oracle, ledger, rng(), 1, 0.1) for _ in range(STREAMS)),
            *(streaming.stream(one, oracle, ledger, rng(), 0, 0.1) for _ in range(STREAMS // 4)),
            *(streaming.session(one, oracle, ledger, rng(), f"session {each}") for each in range(SESSIONS)),
            *(inference.infer(channel, oracle, ledger, rng()) for _ in range(2)),
            *(inference.stream(channel, oracle, ledger, rng(), each) for each in range(3)),
            streaming.read_slowly(channel, oracle, ledger, rng()),
            faults.reload(oracle, channel, ledger, rng()),
            faults.kill(replica, ledger, rng(), min(seconds / 4, 20.0)),
        ]
        tasks = [asyncio.create_task(actor) for actor in actors]
        try:
            done, _ = await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_EXCEPTION)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        for task in done:
            task.result()


def _options() -> list[str]:
    # Abandoned sessions keep their version loaded, so they expire soon.
    return ["--models-poll", str(POLL), "--session-ttl", "20"]


def _start(models: Path, log: Path, address: str) -> ServerProcess:
    return ServerProcess(models, log, *_options(), "--listen", address)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


if __name__ == "__main__":
    cli.run("soak", command, "unroll-server")
