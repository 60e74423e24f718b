"""Sessions on real servers: shared by workers and replicas, kept across restarts, and not lost with a process."""

import os
import random
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path

import grpc
import grpc.aio
import numpy as np
import pytest
from google.rpc import error_details_pb2
from support import wire
from support.processes import ServerProcess
from support.redis_server import RedisServer, needs_redis
from support.wall_clock import WallClock
from support.workers import wait_until_gone, workers_of

from unroll_client import Client, FailedPrecondition, NotFound, Unavailable
from unroll_proto.sequences import Sequence as Series
from unroll_proto.v1 import unroll_pb2 as pb
from unroll_proto.v1.unroll_pb2_grpc import UnrollServiceStub


@pytest.fixture(scope="module")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield server


def run_of(client: Client, values: wire.Array) -> wire.Array:
    """Returns the states of an undisturbed stream."""
    with client.unroll("jv") as sequence:
        states = sequence.send(values).states
    assert states is not None
    return states


def request(session_id: str, values: object, **more: object) -> pb.AdvanceRequest:
    fields = {"return_states": True, "return_logits": True, **more}
    return pb.AdvanceRequest(session_id=session_id, values=wire.to_bytes(values), **fields)  # type: ignore[arg-type]


async def refusal(stub: UnrollServiceStub, asked: pb.AdvanceRequest) -> tuple[str, str, str]:
    """Returns code, reason and message of a call that fails."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Advance(asked)
    reason = ""
    info = error_details_pb2.ErrorInfo()
    for detail in wire.details_of(caught.value).details:
        if detail.Unpack(info):
            reason = info.reason
    return caught.value.code().name, reason, caught.value.details() or ""


async def test_a_session_has_the_bits_of_a_stream(stub: UnrollServiceStub, vowels: Sequence[Series]) -> None:
    values = np.concatenate([series.values for series in vowels[:2]])[:20]
    opened = [wire.open_request("k"), wire.chunk_request("k", 0, values), wire.snapshot_request("k")]
    streamed = await wire.exchange(stub, opened)
    steps = wire.steps_of(streamed, "k")
    states, logits = (b"".join(getattr(part, kind) for part in steps) for kind in ("states", "logits"))
    first = await stub.Advance(request("wire", values[:7], model="jv", start=True, first_step=0))
    assert (first.model, first.version, first.first_step, first.count, first.step) == ("jv", 1, 0, 7, 7)
    for _ in range(2):
        rest = await stub.Advance(request("wire", values[7:], first_step=7, return_snapshot=True))
        assert (first.states + rest.states, first.logits + rest.logits) == (states, logits)
        assert rest.snapshot == next(each.snapshot for each in streamed if each.HasField("snapshot"))
    whole = await stub.Classify(wire.classify_request([values]))
    assert (rest.label, rest.label_index) == (whole.labels[0], whole.label_indices[0])
    assert rest.probabilities == whole.probabilities
    fork = await stub.Advance(request("fork", values[:3], start=True, initial_state=rest.snapshot))
    assert (fork.first_step, fork.step, fork.version) == (20, 23, 1)
    none = await stub.Advance(request("fork", [], end=True, first_step=23))
    assert (none.count, none.step, none.states, none.label) == (0, 23, b"", "")
    slim = await stub.Advance(pb.AdvanceRequest(session_id="wire", values=wire.to_bytes(values[:1]), end=True))
    assert (slim.first_step, slim.states, slim.logits, slim.HasField("snapshot")) == (20, b"", b"", False)
    assert slim.label


async def test_each_error_has_a_code_and_a_reason(stub: UnrollServiceStub, vowels: Sequence[Series]) -> None:
    values = vowels[0].values[:4]
    nan = values.copy()
    nan[1, 2] = np.nan
    await stub.Advance(request("refused", values, model="jv", start=True))
    cases = [
        (request("nobody", values), "NOT_FOUND", "SESSION_UNKNOWN", "session_id: no session 'nobody'"),
        (
            request("refused", values, first_step=2),
            "ABORTED",
            "SESSION_TAKEN",
            "2, another writer has advanced the session to step 4",
        ),
        (
            request("refused", values, first_step=9),
            "FAILED_PRECONDITION",
            "",
            "first_step: 9, the session continues at",
        ),
        (request("refused", values, version=3), "FAILED_PRECONDITION", "", "version: the session is of jv/1"),
        (request("refused", nan), "INVALID_ARGUMENT", "", "values: step 1 of the chunk, feature 2 is not finite"),
        (request("refused", []), "INVALID_ARGUMENT", "", "values: no timesteps"),
        (request("refused", values[:1, :5]), "INVALID_ARGUMENT", "", "values: 20 bytes, 0 to "),
        (request("", values), "INVALID_ARGUMENT", "", "session_id: 0 bytes, 1 to 128"),
        (request("x" * 129, values), "INVALID_ARGUMENT", "", "session_id: 129 bytes"),
        (request("new", values, start=True, model="none"), "NOT_FOUND", "", "model: 'none' is not served"),
        (request("refused", values, initial_state=pb.Snapshot(format=1)), "INVALID_ARGUMENT", "", "initial_state"),
        (
            request("new", values, start=True, initial_state=pb.Snapshot(format=1, model="jv", version=1)),
            "FAILED_PRECONDITION",
            "",
            "initial_state: the snapshot is of jv/1 (), the request is for jv/1 (simple_rnn)",
        ),
    ]
    for asked, code, reason, says in cases:
        refused = await refusal(stub, asked)
        assert refused[:2] == (code, reason), (asked, refused)
        assert says in refused[2]
    assert (await stub.Advance(request("refused", values, first_step=4, end=True))).step == 8


def test_workers_share_sessions_and_lose_none_when_killed(
    bundle_root: Path, vowels: Sequence[Series], tmp_path: Path
) -> None:
    values = np.concatenate([series.values for series in vowels[:5]])[:60]
    with ServerProcess(bundle_root, tmp_path / "log", "--workers", "2") as server:
        with Client(server.address) as client:
            expected = run_of(client, values)
        for step in range(0, 60, 5):
            # Each client has its own connection, to any worker.
            with Client(server.address, wait_for_ready=True) as client:
                done = client.advance("s", values[step : step + 5], model="jv", start=step == 0, first_step=step)
            assert done.states is not None
            assert done.states.tobytes() == expected[step : step + 5].tobytes()
            if step == 30:
                victim = workers_of(server.process.pid)[0]
                os.kill(victim, signal.SIGKILL)
                wait_until_gone(victim)
        assert server.stop() == 0, server.log


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_restart_keeps_the_sessions_and_reads_no_old_state(
    bundle_root: Path, workers: str, vowels: Sequence[Series], tmp_path: Path
) -> None:
    values = np.concatenate([series.values for series in vowels[:5]])[:60]
    file = tmp_path / "sessions"
    options = ("--workers", workers, "--sessions-file", str(file))
    for begin in (0, 20):
        with ServerProcess(bundle_root, tmp_path / f"log{begin}", *options) as server:
            assert not file.exists(), "the file of a running server's sessions must not be read again"
            with Client(server.address) as client:
                expected = run_of(client, values)
                for step in range(begin, begin + 20, 4):
                    done = client.advance("s", values[step : step + 4], model="jv", start=step == 0, first_step=step)
                    assert done.states is not None
                    assert done.states.tobytes() == expected[step : step + 4].tobytes()
                again = client.advance("s", values[step : step + 4], model="jv", first_step=step)
                assert again.states is not None
                assert again.states.tobytes() == expected[step : step + 4].tobytes()
            assert server.stop() == 0, server.log
        assert "saved 1 sessions" in server.log
        assert oct(file.stat().st_mode & 0o777) == "0o600"


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_step_of_the_wall_clock_expires_no_session(
    bundle_root: Path, workers: str, vowels: Sequence[Series], tmp_path: Path
) -> None:
    clock, values = WallClock(tmp_path / "clock"), vowels[0].values
    options = ("--workers", workers, "--session-ttl", "600", "--sessions-file", str(tmp_path / "sessions"))
    for begin, step_while_down in ((0, 7200), (3, -7200)):
        log = tmp_path / f"log{begin}"
        with ServerProcess(bundle_root, log, *options, env=clock.env) as server:
            with Client(server.address) as client:
                for number, shift in enumerate((0, 7200, -7200), begin):
                    clock.set(shift)
                    step = values[number : number + 1]
                    assert client.advance("s", step, model="jv", start=not number, first_step=number).step == number + 1
            assert server.stop() == 0, server.log
        clock.set(step_while_down)


@needs_redis
def test_any_replica_continues_a_session_and_a_killed_one_loses_no_answered_chunk(
    bundle_root: Path, vowels: Sequence[Series], redis_server: RedisServer, tmp_path: Path
) -> None:
    values = np.concatenate([series.values for series in vowels[:10]])[:120]
    choose = random.Random(7)  # noqa: S311
    options = ("--sessions", redis_server.url)
    servers = [ServerProcess(bundle_root, tmp_path / f"log{n}", *options) for n in range(2)]
    try:
        with Client(servers[0].address) as client:
            expected = run_of(client, values)
        step = 0
        while step < len(values):
            if step > 60:
                servers[0].signal(signal.SIGKILL)
            count = choose.randint(1, 9)
            server = choose.choice(servers[step > 60 :])
            with Client(server.address) as client:
                done = client.advance("s", values[step : step + count], model="jv", start=step == 0, first_step=step)
            assert done.states is not None
            assert done.states.tobytes() == expected[step : step + count].tobytes()
            step = done.step
    finally:
        for server in servers:
            server.signal(signal.SIGKILL)
            server.wait()


@needs_redis
def test_a_server_without_its_redis_serves_other_calls(
    bundle_root: Path, vowels: Sequence[Series], tmp_path: Path
) -> None:
    values = vowels[0].values[:12]
    with RedisServer(tmp_path) as redis_server:
        redis_server.kill()
        options = ("--sessions", redis_server.url)
        with (
            ServerProcess(bundle_root, tmp_path / "server.log", *options) as server,
            Client(server.address, model="jv", timeout=20) as client,
        ):
            expected = run_of(client, values)
            with pytest.raises(Unavailable) as caught:
                client.advance("s", values[:4], start=True)
            assert caught.value.reason == "SESSION_STORE"
            redis_server.start()
            client.advance("s", values[:4], start=True)
            redis_server.kill()
            assert client.classify([values]).labels
            with pytest.raises(Unavailable):
                client.advance("s", values[4:8])
            redis_server.start()
            done = client.advance("s", values[4:8], first_step=4)
            assert done.states is not None
            assert done.states.tobytes() == expected[4:8].tobytes()
            # A Redis that hangs delays no other calls.
            redis_server.signal(signal.SIGSTOP)
            with pytest.raises((Unavailable, TimeoutError)):
                client.advance("s", values[8:], timeout=1.0)
            assert client.classify([values]).labels
            redis_server.signal(signal.SIGCONT)
            assert server.stop() == 0, server.log
        assert "the sessions' store does not answer" in server.log


def test_errors_of_sessions_in_the_client(server: ServerProcess, vowels: Sequence[Series]) -> None:
    with Client(server.address, model="jv") as client:
        with pytest.raises(NotFound) as caught:
            client.advance("nobody", vowels[0].values)
        assert caught.value.reason == "SESSION_UNKNOWN"
        client.advance("client", vowels[0].values[:3], start=True, states=False)
        with pytest.raises(FailedPrecondition):
            client.advance("client", vowels[0].values[:3], first_step=5)
        ended = client.advance("client", end=True, return_snapshot=True, logits=True)
        assert ended.snapshot is not None
        assert (ended.count, ended.step, ended.snapshot.step, len(ended.probabilities)) == (0, 3, 3, 0)
        assert ended.logits is not None
        assert len(ended.logits) == 0
