"""Injected faults: killed and restarted servers, added and removed versions, broken ones among them."""

import asyncio
import signal
from collections.abc import Callable
from types import TracebackType
from typing import Self

import grpc.aio
import numpy as np
from support import wire
from support.processes import ServerProcess
from support.waiting import until

from soak.ledger import Ledger
from soak.oracle import NAME, VERSIONS, Oracle
from unroll_proto.v1 import unroll_pb2 as pb
from unroll_proto.v1.unroll_pb2_grpc import UnrollServiceStub

"""Seconds within which a server must notice a version."""


class Replica:
    """A server that can be restarted on the same port.

    Args:
        start: Starts it on an address.
    """

    def __init__(self, start: Callable[[str], ServerProcess]) -> None:
        self._start = start
        self._again: asyncio.Task[None] | None = None
        self.server = start("127.0.0.1:0")
        self.address = self.server.address

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # A server that is starting would outlive this process.
        if self._again:
            await asyncio.gather(self._again, return_exceptions=True)
        self.server.__exit__(kind, error, trace)

    async def again(self, number: signal.Signals) -> int:
        """Ends it by SIGKILL or SIGTERM and restarts it; returns its exit code."""
        self.server.signal(number)
        ended = self.server
        self._again = asyncio.create_task(self._replace())
        # A started server is ended even if nobody waits for it.
        await asyncio.shield(self._again)
        return ended.process.returncode

    async def _replace(self) -> None:
        await asyncio.to_thread(self.server.wait)
        self.server = await asyncio.to_thread(self._start, self.address)


async def kill(replica: Replica, ledger: Ledger, rng: np.random.Generator, pause: float) -> None:
    """Ends a replica repeatedly, `pause` seconds apart on average, mostly by SIGKILL, sometimes by a drain."""
    while True:
        await asyncio.sleep(float(rng.uniform(0.5, 1.5)) * pause)
        if rng.random() < 0.3:
            code = await replica.again(signal.SIGTERM)
            ledger.check("servers drained", code == 0, f"ended with {code}")
            ledger.fault("servers drained and started again")
        else:
            await replica.again(signal.SIGKILL)
            ledger.fault("servers killed and started again")


async def reload(oracle: Oracle, channel: grpc.aio.Channel, ledger: Ledger, rng: np.random.Generator) -> None:
    """Adds and removes versions, some of them broken; only good ones may be served."""
    stub = wire.stub_of(channel)
    while True:
        version, other = (int(each) for each in rng.permutation(np.arange(2, VERSIONS + 1))[:2])
        broken = bool(rng.random() < 0.25)
        if broken:
            # A good one follows: once it is served, the broken one has been checked.
            oracle.add(other, broken=True)
            ledger.fault("broken versions")
        oracle.add(version)
        await _until(stub, {1, version})
        if broken:
            ledger.check("broken versions refused", other not in await _served(stub), f"version {other} is served")
            oracle.remove(other)
        oracle.remove(version)
        await _until(stub, {1})
        ledger.right("reloads")


async def _served(stub: UnrollServiceStub) -> set[int]:
    answer = await stub.ListModels(pb.ListModelsRequest())
    return {model.version for model in answer.models if model.name == NAME}


async def _until(stub: UnrollServiceStub, versions: set[int]) -> None:
    async def served() -> bool:
        return await _served(stub) == versions

    await until(served)
