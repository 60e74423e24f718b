"""One run of the benchmark: its processes, its networks, and turns taken by contestants."""

import asyncio
import multiprocessing
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from types import TracebackType
from typing import ParamSpec, Self, TypeVar

from bench import contestants, networks
from bench.asking import Contestant, Group, classifier, echo, triton
from bench.confine import die_with_parent, pin
from bench.machine import Cores
from bench.processes import Server
from unroll_engine.models.spec import Float32Array

P = ParamSpec("P")
K = TypeVar("K")
T = TypeVar("T")


class Session:
    """Servers are started when a row first needs them, stay for the next rows, and end with the session.

    Args:
        folder: For models and logs; the caller's to remove.
        cores: Who runs where.
        peers: Contestants beside those that are always there.
        rounds: Repeats of each measurement.
        seconds: Length of each measurement.
        say: Told what is being done.
    """

    def __init__(
        self, folder: Path, cores: Cores, peers: set[str], rounds: int, seconds: float, say: Callable[[str], None]
    ) -> None:
        self.cores = cores
        self.peers = peers
        self.rounds = rounds
        self.seconds = seconds
        self._servers: dict[tuple[str, str], Server] = {}
        self._folder = folder
        self._say = say
        self._stack = AsyncExitStack()
        self._pool: ProcessPoolExecutor | None = None

    async def repository(self, network: str) -> Path:
        """The model repository of one network; exported, with proof, by the first who asks."""
        self._say(f"exporting {network}")
        return await asyncio.to_thread(networks.export, network, self._folder)

    async def server(self, contestant: str, network: str) -> Server:
        """The running server of a contestant.

        Raises:
            StartError: it can't run here.
        """
        key = (contestant, network)
        if key not in self._servers:
            self._servers[key] = await self._stack.enter_async_context(self.fresh_server(contestant, network))
        return self._servers[key]

    @asynccontextmanager
    async def fresh_server(self, contestant: str, network: str) -> AsyncIterator[Server]:
        """A server of a contestant that nobody has asked before, for as long as the context is open.

        Raises:
            StartError: it can't run here.
        """
        repository = await self.repository(network)
        self._say(f"starting {contestant}")
        command = contestants.command(contestant, network, repository)
        log = self._folder / f"{contestant}-{network}.log".replace(" ", "-")
        server = await Server.start(command, self.cores.server, log)
        try:
            yield server
        finally:
            await server.stop()

    async def contestant(
        self, name: str, network: str, groups: Sequence[Group], expected: Sequence[Float32Array]
    ) -> Contestant:
        """A contestant that has answered every group of sequences as eager PyTorch does.

        Raises:
            StartError: it can't run here.
            WrongAnswerError: it answered something else.
        """
        server = await self.server(name, network)
        self._say(f"checking {name}")
        if name == contestants.TRITON:
            return await triton(name, server.address, groups, expected)
        return await classifier(name, server.address, network, groups, expected)

    async def echo(self, name: str, like: Contestant) -> Contestant:
        """An echo with the messages of another contestant.

        Raises:
            StartError: it can't run here.
        """
        server = await self.server(name, networks.SMALL)
        return await echo(name, server.address, like)

    async def inside(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Runs a function in the worker process on the serving core."""
        if self._pool is None:
            self._pool = ProcessPoolExecutor(
                1, multiprocessing.get_context("spawn"), initializer=_enter_worker, initargs=(self.cores.server,)
            )
        return await asyncio.wrap_future(self._pool.submit(function, *args, **kwargs))

    async def in_turns(
        self, measures: Mapping[K, Callable[[], Awaitable[T]]], rounds: int | None = None
    ) -> dict[K, list[T]]:
        """Runs every measure once a round, in turns, so that what else the machine does hits all alike."""
        rounds = rounds or self.rounds
        results: dict[K, list[T]] = {name: [] for name in measures}
        for turn in range(rounds):
            for name, measure in measures.items():
                self._say(f"round {turn + 1} of {rounds}: {name}")
                results[name].append(await measure())
        return results

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            # A measurement that is under way takes a second or two; nobody waits for the rest.
            await asyncio.to_thread(self._pool.shutdown, cancel_futures=True)
        await self._stack.aclose()


def _enter_worker(core: int) -> None:
    die_with_parent()
    pin(core)
    # Ctrl-C reaches the whole group; who started the worker ends it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
