"""Clients that violate HTTP/2: the server survives in bounded memory and serves others."""

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc.aio
import pytest
from support import wire
from support.abuse import ATTACKS
from support.memory import resident_bytes
from support.processes import PATIENCE, ServerProcess
from support.transports import BOTH
from support.workers import workers_of

from unroll_proto.sequences import Sequence
from unroll_proto.v1 import unroll_pb2 as pb

pytestmark = BOTH

MEMORY = 384 * 2**20
"""Most bytes by which all attacks may enlarge a server; allocators keep some."""


@pytest.fixture(scope="module")
def process(bundle_root: Path, tmp_path_factory: pytest.TempPathFactory, transport: str) -> Iterator[ServerProcess]:
    """A server that only the attacks of this module use."""
    with ServerProcess(bundle_root, tmp_path_factory.mktemp("abused") / "log") as process:
        before = resident_bytes(process.process.pid)
        yield process
        assert resident_bytes(process.process.pid) - before < MEMORY
        assert process.stop() == 0, process.log
        assert "Traceback" not in process.log


@pytest.mark.parametrize("attack", ATTACKS, ids=[attack.__name__ for attack in ATTACKS])
async def test_the_server_lives_and_serves_others(
    process: ServerProcess, vowels: list[Sequence], attack: Callable[[str], None]
) -> None:
    request = wire.classify_request([vowel.values for vowel in vowels[:4]])
    pid = process.process.pid
    async with grpc.aio.insecure_channel(process.address) as channel:
        stub = wire.stub_of(channel)
        expected = await stub.Classify(request, timeout=PATIENCE)
        workers = workers_of(pid)
        attacking = asyncio.create_task(asyncio.to_thread(attack, process.address))
        while not attacking.done():
            assert await stub.Classify(request, timeout=PATIENCE) == expected
        await attacking
        assert await stub.Classify(request, timeout=PATIENCE) == expected
    options = [("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.insecure_channel(process.address, options) as channel:
        await wire.stub_of(channel).GetModel(pb.GetModelRequest(), timeout=PATIENCE)
    assert process.process.poll() is None
    assert workers_of(pid) == workers
