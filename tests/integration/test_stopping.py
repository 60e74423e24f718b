"""Signals that stop a server: to any of its processes, in any order, and before it serves."""

import asyncio
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import grpc
import grpc.aio
import numpy as np
import pytest
from support import wire
from support.bundles import publish
from support.processes import PATIENCE, ServerProcess
from support.workers import wait_until_gone, workers_of

from unroll_proto.v1 import unroll_pb2 as pb
from unroll_proto.v1.unroll_pb2_grpc import UnrollServiceStub

CONNECTIONS = 6
STOPS = (signal.SIGTERM, signal.SIGINT)


class Caller:
    """A stream with a sequence of three steps, and a long unary call, on one connection."""

    async def begin(self, stub: UnrollServiceStub) -> None:
        """Returns once both are under way."""
        self.stream = stub.Unroll()
        await self.stream.write(wire.open_request("a"))
        await self.stream.write(wire.chunk_request("a", 0, np.zeros((3, 12), np.float32)))
        for _ in range(2):
            assert isinstance(await self.stream.read(), pb.UnrollResponse)
        self.call = asyncio.ensure_future(stub.Classify(wire.classify_request([np.zeros((60000, 12), np.float32)])))
        # One connection keeps the order of its calls.
        await stub.GetModel(pb.GetModelRequest(), timeout=PATIENCE)

    async def lose_nothing(self) -> None:
        """Waits for the end of both, which must be a good one."""
        last = await self.stream.read()
        assert isinstance(last, pb.UnrollResponse)
        assert last.closed.reason == pb.SequenceClosed.REASON_DRAINING
        assert last.closed.snapshot.step == 3
        assert await self.stream.read() is grpc.aio.EOF
        assert await self.stream.code() == grpc.StatusCode.OK
        assert (await self.call).labels


@asynccontextmanager
async def callers_of(process: ServerProcess) -> AsyncIterator[list[Caller]]:
    """Callers with a connection each, which is as long as the context."""
    async with AsyncExitStack() as stack:
        callers = [Caller() for _ in range(CONNECTIONS)]
        for caller in callers:
            channel = grpc.aio.insecure_channel(process.address, [("grpc.use_local_subchannel_pool", 1)])
            await caller.begin(wire.stub_of(await stack.enter_async_context(channel)))
        yield callers


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("seed", range(3))
async def test_signals_to_any_processes_in_any_order_lose_nothing(
    bundle_root: Path, tmp_path: Path, workers: int, seed: int
) -> None:
    """The first seed signals every process, as systemd does; the others some of them, in part twice."""
    chance = random.Random(seed)  # noqa: S311
    with ServerProcess(bundle_root, tmp_path / "log", "--workers", str(workers)) as process:
        processes = [process.process.pid, *workers_of(process.process.pid)]
        some = processes if seed == 0 else chance.sample(processes, chance.randint(1, len(processes)))
        targets = some * (1 + seed % 2)
        chance.shuffle(targets)
        async with callers_of(process) as callers:
            for target in targets:
                os.kill(target, chance.choice(STOPS))
            # The parent's own may come while its workers drain already.
            process.signal(signal.SIGTERM)
            await asyncio.gather(*(caller.lose_nothing() for caller in callers))
        assert process.wait() == 0, process.log
    wait_until_gone(*processes)
    assert " ERROR " not in process.log


async def test_workers_that_are_stopped_alone_drain_and_are_started_again(bundle_root: Path, tmp_path: Path) -> None:
    with ServerProcess(bundle_root, tmp_path / "log", "--workers", "2") as process:
        old = workers_of(process.process.pid)
        async with callers_of(process) as callers:
            for worker in old:
                # Its whole group; it has one of its own.
                os.killpg(worker, signal.SIGTERM)
            await asyncio.gather(*(caller.lose_nothing() for caller in callers))
        deadline = time.monotonic() + PATIENCE
        while process.log.count("starting it again") < 2 or len(workers_of(process.process.pid)) < 2:
            assert time.monotonic() < deadline, process.log
            await asyncio.sleep(0.02)
        # The new ones need not serve yet.
        assert process.stop() == 0, process.log
    assert " ERROR " not in process.log


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


@pytest.mark.parametrize("module", ["click", "grpc"])
@pytest.mark.parametrize("number", STOPS)
def test_process_1_ends_at_once_while_its_imports_run(
    bundle_root: Path, tmp_path: Path, module: str, number: signal.Signals
) -> None:
    unshare = ["unshare", "--pid", "--fork", "--mount-proc"]
    if not shutil.which("unshare") or subprocess.run([*unshare, "true"], check=False, capture_output=True).returncode:
        pytest.skip("this machine does not let a process have a PID namespace of its own")
    # An import that never ends, and tells when it has begun.
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
            deadline = time.monotonic() + PATIENCE
            while " loaded" not in log.read_text():
                assert time.monotonic() < deadline
                time.sleep(0.01)
            process.send_signal(signal.SIGTERM)
            announced, _ = process.communicate(timeout=PATIENCE)
        finally:
            process.kill()
    assert process.returncode == 0, log.read_text()
    assert announced == b""
    assert log.read_text().count(" loaded") < 100
    assert " ERROR " not in log.read_text()
