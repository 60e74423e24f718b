"""A server process from start to end: settings, ports, callers that vanish, drains."""

import asyncio
import signal
import sys
from pathlib import Path

import grpc
import grpc.aio
import numpy as np
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from support import wire
from support.operators import wait_for_log
from support.processes import PATIENCE, ServerProcess, run
from support.waiting import until

from unroll_client import Client
from unroll_proto.sequences import Sequence
from unroll_proto.v1 import unroll_pb2 as pb


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_drain_ends_calls_in_flight_and_streams_with_their_snapshots(
    bundle_root: Path, tmp_path: Path, vowels: list[Sequence], number: signal.Signals
) -> None:
    values = vowels[0].values
    with ServerProcess(bundle_root, tmp_path / "log") as process:
        async with grpc.aio.insecure_channel(process.address) as channel:
            stub = wire.stub_of(channel)
            watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
            stream = stub.Unroll()
            for request in (wire.open_request("a"), wire.chunk_request("a", 0, values[:5]), wire.open_request("b")):
                await stream.write(request)
            seen = [await stream.read() for _ in range(3)]
            assert all(isinstance(response, pb.UnrollResponse) for response in seen)
            in_flight = asyncio.ensure_future(stub.Classify(wire.classify_request([np.zeros((60000, 12), np.float32)])))
            # One connection keeps the order of its calls: once this one is answered, the long one has begun.
            await stub.GetModel(pb.GetModelRequest())
            process.signal(number)
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
            rest = []
            while isinstance(response := await stream.read(), pb.UnrollResponse):
                rest.append(response)
            assert await stream.code() == grpc.StatusCode.OK
            assert {response.key: response.closed.snapshot.step for response in rest} == {"a": 5, "b": 0}
            assert {response.closed.reason for response in rest} == {pb.SequenceClosed.REASON_DRAINING}
            assert (await in_flight).labels
            assert process.wait() == 0
    # On another server the sequence resumes from its snapshot to the same end.
    snapshot = next(response.closed.snapshot for response in rest if response.key == "a")
    with ServerProcess(bundle_root, tmp_path / "log2") as other:
        async with grpc.aio.insecure_channel(other.address) as channel:
            stub = wire.stub_of(channel)
            answer = await stub.Classify(wire.classify_request([values[5:]], initial_states=[snapshot]))
            assert answer.logits == (await stub.Classify(wire.classify_request([values]))).logits


async def test_callers_who_come_during_a_drain_are_told_so_and_none_is_cancelled(
    bundle_root: Path, tmp_path: Path, vowels: list[Sequence]
) -> None:
    values, answered = vowels[0].values[:2], 0

    async def call_until_refused(address: str, number: int) -> grpc.StatusCode:
        nonlocal answered
        # Each has its own connection.
        options = [("grpc.use_local_subchannel_pool", 1)]
        async with grpc.aio.insecure_channel(address, options) as channel:
            stub = wire.stub_of(channel)
            try:
                while True:
                    if number % 2:
                        await stub.Classify(wire.classify_request([values]))
                    else:
                        asked = pb.AdvanceRequest(session_id=str(number), start=True, values=wire.to_bytes(values))
                        await stub.Advance(asked)
                    answered += 1
            except grpc.aio.AioRpcError as error:
                return error.code()

    with ServerProcess(bundle_root, tmp_path / "log") as process:
        callers = [asyncio.create_task(call_until_refused(process.address, number)) for number in range(20)]
        await until(lambda: answered >= 200)
        assert not any(caller.done() for caller in callers)
        process.signal(signal.SIGTERM)
        async with asyncio.timeout(PATIENCE):
            assert set(await asyncio.gather(*callers)) == {grpc.StatusCode.UNAVAILABLE}
        assert process.wait() == 0


async def test_a_caller_that_vanishes_takes_nothing_with_it(server: ServerProcess, vowels: list[Sequence]) -> None:
    async with grpc.aio.insecure_channel(server.address) as channel:
        stub = wire.stub_of(channel)
        expected = await stub.Classify(wire.classify_request([vowels[0].values]))
        async with grpc.aio.insecure_channel(server.address) as doomed:
            stream = wire.stub_of(doomed).Unroll()
            await stream.write(wire.open_request("a"))
            for step in range(0, 40000, 10000):
                await stream.write(wire.chunk_request("a", step, np.zeros((10000, 12), np.float32)))
            await stream.read()
            stream.cancel()
        assert await stub.Classify(wire.classify_request([vowels[0].values])) == expected


@pytest.mark.parametrize("workers", [1, 2])
def test_settings_come_from_a_file_and_the_environment_too(bundle_root: Path, tmp_path: Path, workers: int) -> None:
    file = tmp_path / "unroll.toml"
    file.write_text(f"workers = {workers}\n[tuning]\nmax_sequences = 7\nmax_steps = 9\n")
    env = {"UNROLL_TUNING_MAX_STEPS": "8"}
    with ServerProcess(bundle_root, tmp_path / "log", "--config", str(file), env=env) as process:
        with grpc.insecure_channel(process.address) as channel:
            get = channel.unary_unary(
                "/unroll.v1.UnrollService/GetModel",
                request_serializer=pb.GetModelRequest.SerializeToString,
                response_deserializer=pb.GetModelResponse.FromString,
            )
            limits = get(pb.GetModelRequest(model="jv"), timeout=10).model.limits
            assert (limits.max_sequences, limits.max_steps) == (7, 8)
        assert process.stop() == 0


def test_a_port_in_use_ends_the_start_with_one_line(server: ServerProcess, bundle_root: Path) -> None:
    done = run("unroll-serve", "--models", bundle_root, "--listen", server.address, check=False)
    assert done.returncode == 2
    # One line: it is detected before the models are loaded.
    port = server.address.rpartition(":")[2]
    assert done.stderr == f"unroll-serve: --listen: can't listen on {server.address}: port {port} is in use\n"


def test_a_server_on_a_unix_socket_is_one_for_clients_operators_and_probes(
    bundle_root: Path, tmp_path: Path, vowels: list[Sequence]
) -> None:
    listen, admin = (f"unix:{tmp_path / name}.sock" for name in ("serve", "admin"))
    options = ("--listen", listen, "--admin", admin, "--access-log")
    values = vowels[0].values

    def used(process: ServerProcess) -> None:
        assert process.address == listen
        with Client(listen) as client:
            logits = client.classify([values]).logits
            with client.unroll("jv", logits=True) as sequence:
                steps = sequence.send(values).logits
        assert steps is not None
        np.testing.assert_array_equal(steps[-1], logits[0])
        for address in (listen, admin):
            probe = run(Path(sys.executable).name, "-m", "unroll_server.healthcheck", address)
            assert probe.stdout == f"{address}: SERVING\n"
        assert "jv" in run("unroll", "admin", "--server", admin, "index").stdout
        wait_for_log(process, "/unroll.v1.UnrollService/Classify code=OK")
        assert "peer=unix:" in process.log

    with ServerProcess(bundle_root, tmp_path / "killed", *options) as process:
        used(process)
        process.signal(signal.SIGKILL)
        process.process.wait()
    # No server listens on the socket that it left behind.
    assert (tmp_path / "serve.sock").is_socket()
    with ServerProcess(bundle_root, tmp_path / "log", *options) as process:
        used(process)
        assert process.stop() == 0, process.log
    assert not list(tmp_path.glob("*.sock"))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--models", "/nowhere"], "--models: /nowhere is not a folder"),
        (["--listen", "nonsense"], "--listen: 'nonsense' is not HOST:PORT"),
        (["--workers", "0"], "--workers: must be an integer from 1"),
        (["--max-lanes", "7"], "--max-lanes: unknown; did you mean tuning.max_lanes in --config"),
        (["--runtime", "tensorflow"], "--runtime"),
        (["--device", "cuda"], "--device cuda"),
    ],
)
def test_a_bad_setting_ends_the_start_with_one_line(bundle_root: Path, options: list[str], says: str) -> None:
    if "cuda" in options and torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    done = run("unroll-serve", "--models", bundle_root, *options, check=False)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert says in done.stderr
