"""A run of the benchmark: its processes, its model, and the turns of contestants."""

import asyncio
import multiprocessing
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from types import TracebackType
from typing import ParamSpec, Self, TypeVar

from unroll_bench.contest import contestants, network
from unroll_bench.contest.asking import Contestant, Group, classifier, triton
from unroll_bench.contest.confine import die_with_parent, pin
from unroll_bench.contest.figures import Outcome
from unroll_bench.contest.machine import Cores
from unroll_bench.contest.processes import Server, StartError

P = ParamSpec("P")
K = TypeVar("K")
T = TypeVar("T")


class Session:
    """Starts servers when a row first needs them, and keeps them for the next rows, until the session ends.

    Args:
        folder: Folder for the model and logs, which the caller removes.
        cores: Cores of the client and of the servers.
        peers: Further contestants.
        rounds: Repeats of each measurement.
        seconds: Length of each measurement.
    """

    def __init__(self, folder: Path, cores: Cores, peers: set[str], rounds: int, seconds: float) -> None:
        self.cores = cores
        self.peers = peers
        self.rounds = rounds
        self.seconds = seconds
        self._servers: dict[str, Server] = {}
        self._folder = folder
        self._stack = AsyncExitStack()
        self._pool: ProcessPoolExecutor | None = None

    async def repository(self) -> Path:
        """Returns the model repository, which the first call exports, with proof."""
        return await asyncio.to_thread(network.export, self._folder)

    async def server(self, contestant: str) -> Server:
        """Returns the running server of a contestant.

        Raises:
            StartError: it can't run here.
        """
        if contestant not in self._servers:
            self._servers[contestant] = await self._stack.enter_async_context(self.fresh_server(contestant))
        return self._servers[contestant]

    @asynccontextmanager
    async def fresh_server(self, contestant: str) -> AsyncIterator[Server]:
        """Starts a server of a contestant, and stops it when the context is left.

        Raises:
            StartError: it can't run here.
        """
        command = contestants.command(contestant, await self.repository())
        server = await Server.start(command, self.cores.server, self._folder / f"{contestant}.log".replace(" ", "-"))
        try:
            yield server
        finally:
            await server.stop()

    async def contestants(
        self, outcome: Outcome, names: Iterable[str], groups: Sequence[Group]
    ) -> dict[str, Contestant]:
        """Returns the contestants that run here, after they answered every group; notes why others do not run.

        Raises:
            WrongAnswerError: an answer differs from eager PyTorch's.
        """
        there = {}
        expected = [network.eager(group) for group in groups]
        for name in names:
            try:
                server = await self.server(name)
            except StartError as error:
                outcome.notes.append(f"{name}: {error}")
                continue
            ask = triton if name == contestants.TRITON else classifier
            there[name] = await ask(name, server.address, groups, expected)
        return there

    async def inside(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Runs a function in the worker process on the serving core."""
        if self._pool is None:
            self._pool = ProcessPoolExecutor(
                1, multiprocessing.get_context("spawn"), initializer=_enter_worker, initargs=(self.cores.server,)
            )
        return await asyncio.wrap_future(self._pool.submit(function, *args, **kwargs))

    async def in_turns(self, measures: Mapping[K, Callable[[], Awaitable[T]]]) -> dict[K, list[T]]:
        """Runs every measure once per round, in turns, so that other load of the machine affects all alike."""
        results: dict[K, list[T]] = {name: [] for name in measures}
        for _ in range(self.rounds):
            for name, measure in measures.items():
                results[name].append(await measure())
        return results

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            # A running measurement takes a second or two; the rest is dropped.
            await asyncio.to_thread(self._pool.shutdown, cancel_futures=True)
        await self._stack.aclose()


def _enter_worker(core: int) -> None:
    die_with_parent()
    pin(core)
    # Ctrl-C reaches the whole group; the parent ends the worker.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
