"""Several workers behind one port: faults, drains, state that moves, one sum of metrics."""

import asyncio
import os
import re
import signal
import socket
import time
import urllib.request
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families
from support import wire
from support.processes import PATIENCE, ServerProcess, run
from support.waiting import until
from support.workers import connections_of, lives, wait_until_gone, workers_of

from unroll_proto.sequences import Sequence
from unroll_proto.v1 import unroll_pb2 as pb
from unroll_proto.v1.unroll_pb2_grpc import UnrollServiceStub

CONNECTIONS = 16
"""Connections enough for each of two workers to get some."""


@pytest.fixture
def server_of_two(bundle_root: Path, tmp_path: Path) -> Iterator[ServerProcess]:
    options = ("--workers", "2", "--metrics", "127.0.0.1:0")
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    with ServerProcess(bundle_root, tmp_path / "log", *options, env={"TMPDIR": str(temporary)}) as process:
        yield process


@asynccontextmanager
async def connected(address: str, count: int = CONNECTIONS) -> AsyncIterator[list[UnrollServiceStub]]:
    """Yields stubs with one connection each."""
    options = [("grpc.use_local_subchannel_pool", 1)]
    async with AsyncExitStack() as stack:
        channels = [grpc.aio.insecure_channel(address, options) for _ in range(count)]
        yield [wire.stub_of(await stack.enter_async_context(channel)) for channel in channels]


async def ask(address: str, values: wire.Array) -> pb.ClassifyResponse:
    """Classifies over a new connection, which some worker must answer."""
    async with connected(address, 1) as (stub,):
        answer = await stub.Classify(wire.classify_request([values]), timeout=PATIENCE)
    assert isinstance(answer, pb.ClassifyResponse)
    return answer


def figures(process: ServerProcess) -> dict[str, float]:
    """Returns the exported metrics, summed over all labels except `kind`."""
    (url,) = re.findall(r"metrics on (http\S+)", process.log)
    with urllib.request.urlopen(url, timeout=PATIENCE) as answer:  # noqa: S310
        families = list(text_string_to_metric_families(answer.read().decode()))
    sums: dict[str, float] = {}
    for sample in (sample for family in families for sample in family.samples):
        name = sample.name + ("_" + sample.labels["kind"] if "kind" in sample.labels else "")
        sums[name] = sums.get(name, 0) + sample.value
    return sums


async def until_there_are(process: ServerProcess, count: int, restarts: int) -> None:
    """Waits until `count` workers accept connections, after `restarts` restarts."""
    port = int(process.address.rpartition(":")[2])

    async def there_are() -> bool:
        if figures(process)["unroll_worker_restarts_total"] < restarts:
            return False
        async with connected(process.address) as stubs:
            await asyncio.gather(*(stub.GetModel(pb.GetModelRequest(), timeout=PATIENCE) for stub in stubs))
            return sum(connections_of(pid, port) > 0 for pid in workers_of(process.process.pid)) == count

    await until(there_are, lambda: process.log)


async def test_a_worker_that_starts_again_tells_nothing_of_the_one_before_it(server_of_two: ServerProcess) -> None:
    named = ("unroll_workers", "unroll_model_served", "unroll_open_sequences")

    def told() -> list[float]:
        found = figures(server_of_two)
        return [found[name] for name in named]

    pid = server_of_two.process.pid
    old = workers_of(pid)
    async with connected(server_of_two.address) as stubs:
        streams = [stub.Unroll() for stub in stubs]
        for stream in streams:
            await stream.write(wire.open_request("a"))
            await stream.read()
        assert told() == [2, 2, CONNECTIONS]
        port = int(server_of_two.address.rpartition(":")[2])
        rest = connections_of(old[1], port)
        os.kill(old[0], signal.SIGKILL)
        deadline = time.monotonic() + PATIENCE
        while not (new := [worker for worker in workers_of(pid) if worker not in old]):
            assert time.monotonic() < deadline, server_of_two.log
        # It stays at its beginning.
        os.kill(new[0], signal.SIGSTOP)
        try:
            assert told() == [1, 1, rest]
        finally:
            os.kill(new[0], signal.SIGCONT)
        while told() != [2, 2, rest]:
            assert time.monotonic() < deadline, server_of_two.log
        for stream in streams:
            stream.cancel()
    assert server_of_two.stop() == 0, server_of_two.log


async def test_workers_share_the_connections_and_any_goes_on_with_any_sequence(
    server_of_two: ServerProcess, vowels: list[Sequence]
) -> None:
    values = vowels[0].values
    port = int(server_of_two.address.rpartition(":")[2])
    workers = workers_of(server_of_two.process.pid)
    assert len(workers) == 2
    async with connected(server_of_two.address) as stubs:
        requests = [wire.open_request("a"), wire.chunk_request("a", 0, values[:5]), wire.snapshot_request("a")]
        responses = await wire.exchange(stubs[0], requests)
        (snapshot,) = [response.snapshot for response in responses if response.HasField("snapshot")]
        rest = wire.classify_request([values[5:]], initial_states=[snapshot])
        answers = await asyncio.gather(*(stub.Classify(rest) for stub in stubs))
        shares = [connections_of(pid, port) for pid in workers]
        whole = await stubs[0].Classify(wire.classify_request([values]))
    assert min(shares) > 0
    assert sum(shares) == CONNECTIONS
    assert {answer.logits for answer in answers} == {whole.logits}
    assert server_of_two.stop() == 0, server_of_two.log


async def test_a_killed_worker_is_started_again_and_the_others_serve_on(
    server_of_two: ServerProcess, vowels: list[Sequence]
) -> None:
    values = vowels[0].values
    first, second = workers_of(server_of_two.process.pid)
    expected = await ask(server_of_two.address, values)
    for restarts, victim in enumerate((first, second), 1):
        os.kill(victim, signal.SIGKILL)
        wait_until_gone(victim)
        for _ in range(5):
            assert (await ask(server_of_two.address, values)).logits == expected.logits
        await until_there_are(server_of_two, 2, restarts)
    assert {first, second}.isdisjoint(workers_of(server_of_two.process.pid))
    assert server_of_two.log.count("ended with -9; starting it again") == 2
    assert server_of_two.stop() == 0, server_of_two.log


async def test_a_worker_that_can_not_start_again_is_tried_until_it_can(
    bundle_root: Path, tmp_path: Path, vowels: list[Sequence]
) -> None:
    models = tmp_path / "models"
    models.symlink_to(bundle_root)
    with ServerProcess(models, tmp_path / "log", "--workers", "2") as process:
        models.unlink()
        victim = workers_of(process.process.pid)[0]
        os.kill(victim, signal.SIGKILL)
        # Connections that it had not accepted are reset, although another worker listens.
        wait_until_gone(victim)
        deadline = time.monotonic() + PATIENCE
        while f"can't start: --models: {models} is not a folder" not in process.log:
            assert time.monotonic() < deadline, process.log
            await ask(process.address, vowels[0].values)
        models.symlink_to(bundle_root)
        while len(workers_of(process.process.pid)) < 2:
            assert time.monotonic() < deadline, process.log
            await ask(process.address, vowels[0].values)
        assert process.stop() == 0, process.log


async def test_sigterm_drains_every_worker(server_of_two: ServerProcess, tmp_path: Path) -> None:
    workers = workers_of(server_of_two.process.pid)
    async with connected(server_of_two.address) as stubs:
        streams = [stub.Unroll() for stub in stubs]
        for stream in streams:
            await stream.write(wire.open_request("a"))
            await stream.write(wire.chunk_request("a", 0, np.zeros((3, 12), np.float32)))
            await stream.read()
            await stream.read()
        server_of_two.signal(signal.SIGTERM)
        for stream in streams:
            last = await stream.read()
            assert isinstance(last, pb.UnrollResponse)
            assert last.closed.reason == pb.SequenceClosed.REASON_DRAINING
            assert last.closed.snapshot.step == 3
            assert await stream.read() is grpc.aio.EOF
            assert await stream.code() == grpc.StatusCode.OK
    assert server_of_two.wait() == 0, server_of_two.log
    assert not any(map(lives, workers))
    assert server_of_two.log.count("app: draining") == 2
    assert list((tmp_path / "tmp").iterdir()) == []


async def test_calls_cancelled_at_once_leave_the_others_on_their_connection_alone(
    bundle_root: Path, tmp_path: Path
) -> None:
    async def opened(stub: UnrollServiceStub) -> Any:
        stream = stub.Unroll()
        await stream.write(wire.open_request("a"))
        await stream.read()
        return stream

    options = ("--max-concurrent-calls", "1500")
    with ServerProcess(bundle_root, tmp_path / "log", *options) as process:
        async with connected(process.address, 1) as (stub,):
            stays, *leave = await asyncio.gather(*(opened(stub) for _ in range(1500)))
            for stream in leave:
                stream.cancel()
            await stub.GetModel(pb.GetModelRequest(), timeout=PATIENCE)
            await stays.write(wire.chunk_request("a", 0, np.zeros((3, 12), np.float32)))
            answer = await stays.read()
        assert answer.HasField("steps")
        assert process.stop() == 0, process.log


def test_ctrl_c_reaches_the_supervisor_alone(server_of_two: ServerProcess) -> None:
    group = os.getpgid(server_of_two.process.pid)
    assert all(os.getpgid(worker) != group for worker in workers_of(server_of_two.process.pid))
    server_of_two.signal(signal.SIGINT)
    assert server_of_two.wait() == 0, server_of_two.log


def test_impatience_ends_it_at_once(server_of_two: ServerProcess, tmp_path: Path) -> None:
    workers = workers_of(server_of_two.process.pid)
    # A stopped process can't drain.
    os.kill(workers[0], signal.SIGSTOP)
    server_of_two.signal(signal.SIGTERM)
    wait_until_gone(workers[1])
    # Signals within the first second count as the first one.
    while server_of_two.process.poll() is None:
        server_of_two.signal(signal.SIGTERM)
        time.sleep(0.05)
    assert server_of_two.wait() == 128 + signal.SIGTERM
    os.kill(workers[0], signal.SIGCONT)
    wait_until_gone(*workers)
    assert list((tmp_path / "tmp").iterdir()) == []


def test_workers_do_not_outlive_their_supervisor(server_of_two: ServerProcess, tmp_path: Path) -> None:
    workers = workers_of(server_of_two.process.pid)
    assert list((tmp_path / "tmp").iterdir())
    # Only the supervisor: `ServerProcess.signal` would also kill the workers, which have to clean up.
    server_of_two.process.kill()
    server_of_two.wait()
    wait_until_gone(*workers)
    assert list((tmp_path / "tmp").iterdir()) == []


async def test_metrics_are_the_sum_over_workers_dead_ones_included(
    server_of_two: ServerProcess, vowels: list[Sequence]
) -> None:
    request = wire.classify_request([vowel.values for vowel in vowels[:40]])
    steps = sum(request.lengths)
    async with connected(server_of_two.address) as stubs:
        await asyncio.gather(*(stub.Classify(request) for stub in stubs))
    before = figures(server_of_two)
    assert before["unroll_steps_total_real"] == steps * CONNECTIONS
    assert before["unroll_steps_total_computed"] >= steps * CONNECTIONS
    assert before["unroll_ticks_total"] == before["unroll_tick_seconds_count"] > 0
    assert before["unroll_workers"] == 2
    victim = workers_of(server_of_two.process.pid)[0]
    os.kill(victim, signal.SIGKILL)
    await until_there_are(server_of_two, 2, 1)
    assert figures(server_of_two)["unroll_steps_total_real"] == steps * CONNECTIONS
    async with connected(server_of_two.address) as stubs:
        await asyncio.gather(*(stub.Classify(request) for stub in stubs))
    assert figures(server_of_two)["unroll_steps_total_real"] == 2 * steps * CONNECTIONS
    assert server_of_two.stop() == 0, server_of_two.log


def test_one_process_tells_its_metrics_too(bundle_root: Path, tmp_path: Path) -> None:
    with ServerProcess(bundle_root, tmp_path / "log", "--metrics", "127.0.0.1:0") as process:
        found = figures(process)
        assert found["unroll_workers"] == 1
        assert found["process_resident_memory_bytes"] > 1e6
        assert process.stop() == 0, process.log


@pytest.mark.parametrize("workers", ["1", "2"])
def test_workers_that_can_not_start_end_the_start_with_one_line(
    workers: str, bundle_root: Path, tmp_path: Path
) -> None:
    server = ("unroll-serve", "--workers", workers)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        for options, says in (
            (("--models", str(tmp_path)), f"--models: {tmp_path} holds no bundle"),
            (("--models", str(bundle_root), "--metrics", address), f"--metrics: can't listen on {address}"),
        ):
            done = run(*server, "--listen", "127.0.0.1:0", *options, check=False)
            assert done.returncode == 2
            assert done.stderr.startswith(f"unroll-serve: {says}")
            assert len(done.stderr.splitlines()) == 1
            assert done.stdout == ""
