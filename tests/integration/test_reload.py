"""Models change while a server serves: no call fails, and each answer has the bits of its version."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from support import bundles, wire
from support.models import alone, random_network, served
from support.processes import ServerProcess
from support.values import random_values
from support.waiting import until

from unroll_proto.v1 import unroll_pb2 as pb

OPTIONS = ("--models-poll", "0.02")
MODELS = [served(random_network(seed=seed)) for seed in range(2)]
"""Models of the even and of the odd versions."""
ROUNDS = 12
STEPS = 40

VALUES = random_values(STEPS)
EXPECTED = [alone(model, VALUES, None) for model in MODELS]

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


@pytest.fixture
def root(exported: list[Path], tmp_path: Path) -> Path:
    """A repository that holds `m/1`."""
    bundles.publish(exported[1], tmp_path / "models", "m", 1)
    return tmp_path / "models"


@pytest.fixture
def process(root: Path, tmp_path: Path) -> Iterator[ServerProcess]:
    with ServerProcess(root, tmp_path / "log", *OPTIONS) as process:
        yield process
        assert process.stop() == 0, process.log


@asynccontextmanager
async def connected(process: ServerProcess) -> AsyncIterator[tuple[Any, grpc.aio.Channel]]:
    async with grpc.aio.insecure_channel(process.address) as channel:
        yield wire.stub_of(channel), channel


async def until_health(channel: grpc.aio.Channel, name: str, status: int) -> None:
    """Waits until health reports a status for a model."""
    watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=name))
    async for answer in watch:
        if answer.status == status:
            break
    watch.cancel()


async def until_newest(stub: Any, version: int) -> None:
    """Waits until new work gets a version."""

    async def newest() -> bool:
        answer = await stub.GetModel(pb.GetModelRequest(model="m"))
        return bool(answer.model.version == version)

    await until(newest)


def check(version: int, logits: bytes, first: int, last: int) -> None:
    """Checks the bits of steps `first` to `last - 1` of VALUES."""
    assert logits == EXPECTED[version % 2][0][first:last].tobytes()


async def keep_asking(stub: Any, seen: set[int], stop: asyncio.Event) -> int:
    """Classifies until `stop` is set; returns the number of calls."""
    calls = 0
    while not stop.is_set():
        answer = await stub.Classify(wire.classify_request([VALUES], "m"))
        check(answer.version, answer.logits, STEPS - 1, STEPS)
        seen.add(answer.version)
        calls += 1
    return calls


class OpenSequence:
    """A sequence that is open on a stream."""

    def __init__(self, stub: Any) -> None:
        self._call = stub.Unroll()
        self.step = 0
        self.version = 0

    async def _read(self) -> pb.UnrollResponse:
        answer = await self._call.read()
        assert isinstance(answer, pb.UnrollResponse)
        assert not answer.HasField("error"), answer
        return answer

    async def open(self, **more: Any) -> None:
        await self._call.write(wire.open_request("k", "m", **more))
        self.version = (await self._read()).opened.version

    async def advance(self, steps: int) -> None:
        """Sends the next steps and checks the answers."""
        end = min(STEPS, self.step + steps)
        if end == self.step:
            return
        await self._call.write(wire.chunk_request("k", self.step, VALUES[self.step : end]))
        while self.step < end:
            got = (await self._read()).steps
            check(self.version, got.logits, self.step, self.step + got.count)
            self.step += got.count

    async def snapshot(self) -> pb.Snapshot:
        await self._call.write(wire.snapshot_request("k"))
        return (await self._read()).snapshot

    async def close(self) -> None:
        await self.advance(STEPS)
        await self._call.done_writing()
        assert await self._call.read() == grpc.aio.EOF


async def test_versions_come_and_go_under_load(process: ServerProcess, root: Path, exported: list[Path]) -> None:
    async with connected(process) as (stub, channel):
        stop, seen = asyncio.Event(), set[int]()
        askers = [asyncio.create_task(keep_asking(stub, seen, stop)) for _ in range(4)]
        held = []
        for version in range(1, ROUNDS + 1):
            if version > 1:
                bundles.publish(exported[version % 2], root, "m", version)
            await until_newest(stub, version)
            bundles.withdraw(root / "m" / str(version - 1))
            sequence = OpenSequence(stub)
            await sequence.open()
            assert sequence.version == version
            held.append(sequence)
            for other in held:
                await other.advance(3)
        stop.set()
        assert sum(await asyncio.gather(*askers)) >= ROUNDS
        assert seen <= set(range(1, ROUNDS + 1))
        # Open sequences finish on versions that refuse new work.
        await until_health(channel, f"m/{ROUNDS - 1}", NOT_SERVING)
        for sequence in held:
            await sequence.close()
        listed = await stub.ListModels(pb.ListModelsRequest())
        assert [(model.name, model.version) for model in listed.models] == [("m", ROUNDS)]


async def test_a_version_replaced_in_place_does_not_affect_its_sequences(
    process: ServerProcess, root: Path, exported: list[Path]
) -> None:
    async with connected(process) as (stub, _):
        held = OpenSequence(stub)
        await held.open()
        await held.advance(10)

        async def replaced() -> bool:
            answer = await stub.Classify(wire.classify_request([VALUES], "m"))
            return bool(answer.logits == EXPECTED[0][0][-1:].tobytes())

        request = pb.AdvanceRequest(session_id="s", start=True, values=wire.to_bytes(VALUES[:10]), return_logits=True)
        await stub.Advance(request)
        snapshot = await held.snapshot()
        bundles.publish(exported[0], root, "m", 1)
        await until(replaced)
        # Sequences that began on the old content stay on it; the session keeps it loaded.
        await held.close()
        again = pb.AdvanceRequest(session_id="s", values=wire.to_bytes(VALUES[10:20]), return_logits=True)
        check(1, (await stub.Advance(again)).logits, 10, 20)
        forked = OpenSequence(stub)
        await forked.open(initial_state=snapshot)
        forked.version, forked.step = 1, 10
        await forked.close()
        await stub.Advance(pb.AdvanceRequest(session_id="s", end=True))

        async def gone() -> bool:
            return "m/1 unloaded" in process.log

        await until(gone)
        (refused,) = await wire.exchange(stub, [wire.open_request("k", "m", initial_state=snapshot)])
        assert refused.error.code == grpc.StatusCode.FAILED_PRECONDITION.value[0]
        assert f"the snapshot is of m/1 with bundle {snapshot.bundle.hex()}, served is m/1" in refused.error.message


async def test_a_bad_version_is_refused_and_the_old_one_serves(
    process: ServerProcess, root: Path, exported: list[Path]
) -> None:
    async with connected(process) as (stub, channel):
        bundles.publish(exported[0], root, "m", 2, lambda it: (it / "model.onnx").write_bytes(b"bad"))
        bundles.publish(exported[1], root, "other", 1)
        await until_health(channel, "other", SERVING)
        # Models are loaded in the order of their names.
        assert (await stub.GetModel(pb.GetModelRequest(model="m"))).model.version == 1
        assert "refused" in process.log
        assert "model.onnx" in process.log
        bundles.publish(exported[0], root, "m", 2)
        await until_newest(stub, 2)


async def test_health_follows_every_model_by_name(process: ServerProcess, root: Path, exported: list[Path]) -> None:
    async with connected(process) as (_, channel):
        for name in ("", "m", "m/1"):
            await until_health(channel, name, SERVING)
        second = bundles.publish(exported[0], root, "m", 2)
        await until_health(channel, "m/2", SERVING)
        bundles.withdraw(second)
        await until_health(channel, "m/2", NOT_SERVING)
        bundles.withdraw(root / "m" / "1")
        await until_health(channel, "m", NOT_SERVING)
        await until_health(channel, "", SERVING)


async def test_a_snapshot_resumes_while_its_version_is_loaded(
    process: ServerProcess, root: Path, exported: list[Path]
) -> None:
    async with connected(process) as (stub, channel):
        held = OpenSequence(stub)
        await held.open()
        await held.advance(10)
        snapshot = await held.snapshot()
        bundles.publish(exported[0], root, "m", 2)
        await until_newest(stub, 2)
        bundles.withdraw(root / "m" / "1")
        await until_health(channel, "m/1", NOT_SERVING)
        forked = OpenSequence(stub)
        await forked.open(initial_state=snapshot)
        assert forked.version == 1
        forked.step = 10
        await forked.close()
        # It refuses new work, but its metadata can still be read.
        assert (await stub.GetModel(pb.GetModelRequest(model="m", version=1))).model.version == 1
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Classify(wire.classify_request([VALUES], "m", version=1))
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        await held.close()


async def test_only_the_latest_versions_are_served(root: Path, exported: list[Path], tmp_path: Path) -> None:
    with ServerProcess(root, tmp_path / "log", *OPTIONS, "--versions", "latest") as process:
        async with connected(process) as (stub, _):
            for version in (2, 3):
                bundles.publish(exported[version % 2], root, "m", version)
                await until_newest(stub, version)
            listed = await stub.ListModels(pb.ListModelsRequest())
            assert [model.version for model in listed.models] == [3]
        assert process.stop() == 0


async def test_every_worker_loads_new_versions(root: Path, exported: list[Path], tmp_path: Path) -> None:
    with ServerProcess(root, tmp_path / "log", *OPTIONS, "--workers", "2") as process:
        bundles.publish(exported[0], root, "m", 2)
        # Each connection may reach another worker.
        for _ in range(8):
            async with connected(process) as (stub, _):
                await until_newest(stub, 2)
                answer = await stub.Classify(wire.classify_request([VALUES], "m"))
                check(answer.version, answer.logits, STEPS - 1, STEPS)
        assert process.stop() == 0
