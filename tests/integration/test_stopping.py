"""Signals that stop a server: to any of its processes, in any order, at any time."""

import asyncio
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from pathlib import Path

import grpc
import grpc.aio
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from support import wire
from support.bundles import publish
from support.operators import admin_address, channel_to, metrics_address
from support.processes import PATIENCE, ServerProcess, without
from support.redis_server import RedisServer, redis_executable
from support.waiting import until, wait_until
from support.workers import wait_until_gone, workers_of

from unroll_proto.sequences import Sequence
from unroll_proto.v1 import unroll_pb2 as pb
from unroll_proto.v1.unroll_pb2_grpc import UnrollServiceStub

CONNECTIONS = 6
STOPS = (signal.SIGTERM, signal.SIGINT)
LONG = wire.classify_request([np.zeros((60000, 12), np.float32)])
NEVER_RAN = ("has not run this call", "has not run all of this stream", "failed to connect")


async def call_until_refused(call: Callable[[], Awaitable[None]]) -> None:
    """Calls repeatedly until a call is refused, with the message that it did not run."""
    refusal = None
    while refusal is None:
        try:
            await call()
        except grpc.aio.AioRpcError as error:
            refusal = error
    assert refusal.code() == grpc.StatusCode.UNAVAILABLE, refusal
    assert any(text in (refusal.details() or "") for text in NEVER_RAN), refusal


class Caller:
    """Calls of every kind on one connection: a long one, which outlasts a signal, and repeated short ones.

    Args:
        session: Id of the caller's session.
        steps: Number of steps that the session has.
        values: Values of a sequence, [steps, features].
    """

    def __init__(self, session: str, steps: int, values: wire.Array) -> None:
        self.session = session
        self.steps = steps
        self.snapshot = pb.Snapshot()
        self._values = values

    async def begin(self, stub: UnrollServiceStub) -> None:
        """Returns once all are in flight."""
        self._stub = stub
        self._stream = stub.Unroll()
        await self._stream.write(wire.open_request("a"))
        await self._stream.write(wire.chunk_request("a", 0, self._values[:3]))
        steps = 0
        while steps < 3:
            answer = await self._stream.read()
            assert isinstance(answer, pb.UnrollResponse)
            steps += answer.steps.count
        short = (self._classify, self._advance, self._get_model, self._run_stream)
        for call in short:
            await call()
        self._short = [asyncio.ensure_future(call_until_refused(call)) for call in short]
        self._long = asyncio.ensure_future(stub.Classify(LONG))
        # One connection keeps the order of its calls.
        await stub.GetModel(pb.GetModelRequest(), timeout=PATIENCE)

    async def _classify(self) -> None:
        assert (await self._stub.Classify(wire.classify_request([self._values]))).labels

    async def _get_model(self) -> None:
        await self._stub.GetModel(pb.GetModelRequest())

    async def _advance(self) -> None:
        values = wire.to_bytes(self._values[:1])
        answer = await self._stub.Advance(
            pb.AdvanceRequest(session_id=self.session, start=self.steps == 0, values=values)
        )
        self.steps += 1
        assert answer.step == self.steps

    async def _run_stream(self) -> None:
        requests = [wire.open_request("b"), wire.chunk_request("b", 0, self._values), wire.close_request("b")]
        answers = await wire.exchange(self._stub, requests)
        assert answers[-1].HasField("closed")

    async def lose_nothing(self) -> None:
        """Waits for the end of all calls: answered, refused, or ended with a snapshot."""
        await asyncio.gather(*self._short)
        last = await self._stream.read()
        assert isinstance(last, pb.UnrollResponse)
        assert last.closed.reason == pb.SequenceClosed.REASON_DRAINING
        assert last.closed.snapshot.step == 3
        await self._stream.done_writing()
        assert await self._stream.read() is grpc.aio.EOF
        assert await self._stream.code() == grpc.StatusCode.OK
        assert (await self._long).labels
        self.snapshot = last.closed.snapshot


@asynccontextmanager
async def calling(address: str, callers: list[Caller]) -> AsyncIterator[None]:
    """Gives each caller a connection, and returns once their calls are under way."""
    async with AsyncExitStack() as stack:
        stubs = [wire.stub_of(await stack.enter_async_context(channel_to(address))) for _ in callers]
        await asyncio.gather(*(caller.begin(stub) for caller, stub in zip(callers, stubs, strict=True)))
        yield


@pytest.fixture(params=[("1", "file"), ("2", "file"), ("2", "redis")], ids="-".join)
def options(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, ...]]:
    """Number of workers, and the session store."""
    workers, kind = request.param
    if kind == "file":
        yield "--workers", workers, "--sessions-file", str(tmp_path / "sessions")
        return
    if redis_executable() is None:
        pytest.skip("there is no redis-server")
    with RedisServer(tmp_path) as redis:
        yield "--workers", workers, "--sessions", redis.url


@pytest.mark.parametrize(("seed", "missing"), [(0, None), (1, "uvloop"), (2, None)])
async def test_signals_to_any_processes_in_any_order_lose_nothing(
    bundle_root: Path,
    tmp_path: Path,
    server: ServerProcess,
    vowels: list[Sequence],
    options: tuple[str, ...],
    seed: int,
    missing: str | None,
) -> None:
    """Signals every process for the first seed, as systemd does; for others some processes, some of them twice."""
    env = without(missing, tmp_path) if missing else {}
    options = (*options, "--admin", "127.0.0.1:0", "--metrics", "127.0.0.1:0")
    chance = random.Random(seed)  # noqa: S311
    values = vowels[seed].values
    steps = [0] * CONNECTIONS
    for number in range(2):
        log = tmp_path / f"log{number}"
        with ServerProcess(bundle_root, log, *options, env=env) as process:
            processes = [process.process.pid, *workers_of(process.process.pid)]
            some = processes if number == seed == 0 else chance.sample(processes, chance.randint(1, len(processes)))
            targets = some * chance.randint(1, 2)
            chance.shuffle(targets)
            callers = [Caller(str(index), step, values) for index, step in enumerate(steps)]
            async with calling(process.address, callers), watched(process):
                for target in targets:
                    os.kill(target, chance.choice(STOPS))
                # The parent's signal may arrive while its workers drain.
                process.signal(signal.SIGTERM)
                await asyncio.gather(*(caller.lose_nothing() for caller in callers))
            assert process.wait() == 0, process.log
        wait_until_gone(*processes)
        assert " ERROR " not in process.log
        assert not missing or "on the event loop of asyncio" in process.log
        # The next round continues the sessions, each right after its last answer.
        steps = [caller.steps for caller in callers]
    await resume_elsewhere(server, callers, values)


async def resume_elsewhere(server: ServerProcess, callers: list[Caller], values: wire.Array) -> None:
    """Continues the streams from their snapshots on another server, to the bits of an undisturbed run."""
    async with channel_to(server.address) as channel:
        stub = wire.stub_of(channel)
        whole = await stub.Classify(wire.classify_request([values]))
        for caller in callers:
            rest = wire.classify_request([values[3:]], initial_states=[caller.snapshot])
            assert (await stub.Classify(rest)).logits == whole.logits


@asynccontextmanager
async def watched(process: ServerProcess) -> AsyncIterator[None]:
    """Health watchers of both listeners, which the drain ends."""
    async with AsyncExitStack() as stack:
        watchers = []
        for address in (process.address, admin_address(process)):
            channel = await stack.enter_async_context(channel_to(address))
            watcher = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
            assert (await watcher.read()).status == health_pb2.HealthCheckResponse.SERVING
            watchers.append(watcher)
        yield
        for watcher in watchers:
            assert (await watcher.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
            assert await watcher.code() == grpc.StatusCode.UNAVAILABLE


async def test_workers_that_are_stopped_alone_drain_and_are_started_again(
    bundle_root: Path, tmp_path: Path, vowels: list[Sequence]
) -> None:
    with ServerProcess(bundle_root, tmp_path / "log", "--workers", "2") as process:
        old = workers_of(process.process.pid)
        callers = [Caller(str(index), 0, vowels[0].values) for index in range(CONNECTIONS)]
        async with calling(process.address, callers):
            for worker in old:
                # Its whole process group.
                os.killpg(worker, signal.SIGTERM)
            await asyncio.gather(*(caller.lose_nothing() for caller in callers))
        await until(lambda: process.log.count("starting it again") == 2, lambda: process.log)
        await until(lambda: len(workers_of(process.process.pid)) == 2, lambda: process.log)
        # The new workers need not serve yet.
        assert process.stop() == 0, process.log
    assert " ERROR " not in process.log


@pytest.mark.parametrize("workers", ["1", "2"])
def test_connections_without_calls_do_not_hold_up_a_drain(bundle_root: Path, tmp_path: Path, workers: str) -> None:
    options = ("--workers", workers, "--admin", "127.0.0.1:0", "--metrics", "127.0.0.1:0")
    with (
        ServerProcess(bundle_root, tmp_path / "log", *options, "--drain-timeout", "600") as process,
        ExitStack() as stack,
    ):
        for address in (process.address, admin_address(process), metrics_address(process)):
            host, _, port = address.rpartition(":")
            stack.enter_context(socket.create_connection((host, int(port)), timeout=PATIENCE))
        assert process.stop() == 0, process.log


@pytest.mark.parametrize("workers", ["1", "2"])
async def test_a_drain_that_cancels_calls_does_not_end_with_0(bundle_root: Path, tmp_path: Path, workers: str) -> None:
    long = wire.classify_request([np.zeros((60000, 12), np.float32)] * 5)
    options = ("--workers", workers, "--drain-timeout", "0.05")
    with ServerProcess(bundle_root, tmp_path / "log", *options) as process:
        async with grpc.aio.insecure_channel(process.address) as channel:
            stub = wire.stub_of(channel)
            calls = [asyncio.ensure_future(stub.Classify(long)) for _ in range(8)]
            await stub.GetModel(pb.GetModelRequest(), timeout=PATIENCE)
            process.signal(signal.SIGTERM)
            ends = await asyncio.gather(*calls, return_exceptions=True)
        assert any(isinstance(end, grpc.aio.AioRpcError) for end in ends)
        assert process.wait() == 1, process.log
    assert "cancelled the calls that had not ended in --drain-timeout 0.05 s" in process.log


@pytest.mark.parametrize("workers", ["1", "2"])
async def test_a_drain_without_time_ends_with_0_where_no_call_is_in_flight(
    bundle_root: Path, tmp_path: Path, workers: str
) -> None:
    with ServerProcess(bundle_root, tmp_path / "log", "--workers", workers, "--drain-timeout", "0") as process:
        async with channel_to(process.address) as channel:
            await wire.stub_of(channel).GetModel(pb.GetModelRequest(), timeout=PATIENCE)
            assert process.stop() == 0, process.log


@pytest.mark.parametrize("module", ["click", "grpc"])
@pytest.mark.parametrize("number", STOPS)
def test_process_1_ends_at_once_while_its_imports_run(
    bundle_root: Path, tmp_path: Path, module: str, number: signal.Signals
) -> None:
    unshare = ["unshare", "--pid", "--fork", "--mount-proc"]
    if not shutil.which("unshare") or subprocess.run([*unshare, "true"], check=False, capture_output=True).returncode:
        pytest.skip("this machine does not let a process have a PID namespace of its own")
    # An import that never ends, and reports that it has begun.
    told = tmp_path / "told"
    os.mkfifo(told)
    (tmp_path / f"{module}.py").write_text(f"open({str(told)!r}, 'w').close()\nimport time\ntime.sleep(3600)\n")
    path = os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH"))))
    command = [*unshare, sys.executable, "-m", "unroll_server", "--models", str(bundle_root), "--listen", "127.0.0.1:0"]
    with subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path}) as process:
        try:
            told.read_text()
            (first,) = workers_of(process.pid)
            os.kill(first, number)
            assert process.wait(PATIENCE) == 0
        finally:
            process.kill()


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_stop_while_models_load_ends_the_start_at_once(bundle_root: Path, tmp_path: Path, workers: str) -> None:
    models, log = tmp_path / "models", tmp_path / "log"
    for version in range(1, 101):
        publish(bundle_root / "jv" / "1", models, "jv", version)
    command = [sys.executable, "-m", "unroll_server", "--models", str(models), "--listen", "127.0.0.1:0"]
    with log.open("wb") as stderr:
        process = subprocess.Popen([*command, "--workers", workers], stdout=subprocess.PIPE, stderr=stderr)
    with process:
        try:
            wait_until(lambda: " loaded" in log.read_text())
            process.send_signal(signal.SIGTERM)
            announced, _ = process.communicate(timeout=PATIENCE)
        finally:
            process.kill()
    assert process.returncode == 0, log.read_text()
    assert announced == b""
    assert log.read_text().count(" loaded") < 100
    assert " ERROR " not in log.read_text()
