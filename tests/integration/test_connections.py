"""Limits of connections: number, calls, age, silence, slow readers."""

import asyncio
import struct
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import grpc
import grpc.aio
import numpy as np
import pytest
from support import wire
from support.memory import resident_bytes
from support.processes import PATIENCE, ServerProcess
from support.raw_http2 import (
    ACK,
    END_STREAM,
    ENHANCE_YOUR_CALM,
    GOAWAY,
    HEADERS,
    MAX_CONCURRENT_STREAMS,
    PING,
    PREFACE,
    SETTINGS,
    Connection,
    frame,
    settings,
)
from support.transports import BOTH
from support.values import random_values

from unroll_proto.v1 import unroll_pb2 as pb
from unroll_server.middleware.slow_readers import CONNECTION_BYTES

pytestmark = BOTH

CLASSIFY = "/unroll.v1.UnrollService/Classify"

OWN = [("grpc.use_local_subchannel_pool", 1)]
"""A channel's option: a connection of its own."""


@pytest.fixture(scope="module")
def process(bundle_root: Path, tmp_path_factory: pytest.TempPathFactory, transport: str) -> Iterator[ServerProcess]:
    """A server with tight limits."""
    log = tmp_path_factory.mktemp("limited") / "log"
    tuning = {"max_connections": 4, "keepalive": 1}
    with ServerProcess(bundle_root, log, "--max-concurrent-calls", "3", tuning=tuning) as process:
        yield process
        assert process.stop() == 0, process.log


def test_connections_over_the_limit_are_closed_and_the_others_live(process: ServerProcess) -> None:
    deadline = time.monotonic() + PATIENCE

    def connected() -> Connection:
        # Other connections may still be closing.
        while not (connection := Connection(process.address)).is_alive():
            connection.socket.close()
            assert time.monotonic() < deadline
        return connection

    with ExitStack() as stack:
        good = [stack.enter_context(connected()) for _ in range(4)]
        with Connection(process.address) as fifth:
            assert not fifth.is_alive()
        assert all(each.is_alive() for each in good)
        good[0].socket.close()
        stack.enter_context(connected())


def test_the_server_says_how_many_calls_a_connection_may_have(process: ServerProcess) -> None:
    said, deadline = None, time.monotonic() + PATIENCE
    while said is None:
        # Connections of earlier tests may still be closing, and count.
        assert time.monotonic() < deadline
        with Connection(process.address) as connection:
            said = next((each for each in connection.frames() if each.kind == SETTINGS and not each.flags & ACK), None)
    assert dict(struct.iter_unpack(">HI", said.payload))[MAX_CONCURRENT_STREAMS] == 3


async def test_callers_beyond_the_limit_of_a_connection_wait_their_turn(process: ServerProcess) -> None:
    request = wire.classify_request([np.zeros((5, 12), np.float32)])
    async with grpc.aio.insecure_channel(process.address, options=OWN) as channel:
        stub = wire.stub_of(channel)

        async def ask() -> None:
            for _ in range(10):
                assert (await stub.Classify(request, timeout=PATIENCE)).labels

        await asyncio.gather(*(ask() for _ in range(50)))


async def test_metadata_are_bounded_in_bytes_and_in_nothing_else(process: ServerProcess) -> None:
    async with grpc.aio.insecure_channel(process.address, options=OWN) as channel:
        stub = wire.stub_of(channel)
        many = grpc.aio.Metadata(*((f"k{number}", "v") for number in range(300)))
        await stub.GetModel(pb.GetModelRequest(model="jv"), metadata=many, timeout=PATIENCE)
        await stub.GetModel(pb.GetModelRequest(model="jv"), metadata=(("k", "v" * 15_000),), timeout=PATIENCE)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.GetModel(pb.GetModelRequest(model="jv"), metadata=(("k", "v" * 17_000),), timeout=PATIENCE)
        assert refused.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        await stub.GetModel(pb.GetModelRequest(model="jv"), timeout=PATIENCE)


def test_a_client_that_does_not_answer_pings_is_left(process: ServerProcess) -> None:
    with Connection(process.address) as connection:
        kinds = []
        for each in connection.frames():
            kinds.append((each.kind, each.flags & ACK))
            if (PING, 0) in kinds:
                break
    assert (PING, 0) in kinds


async def test_an_old_connection_is_left_and_its_calls_end_as_they_would_have(
    bundle_root: Path, tmp_path: Path
) -> None:
    with ServerProcess(bundle_root, tmp_path / "log", tuning={"max_connection_age": 1}) as process:
        await _outlive_a_connection(process)
        assert process.stop() == 0, process.log


async def _outlive_a_connection(process: ServerProcess) -> None:
    async with grpc.aio.insecure_channel(process.address, OWN) as channel:
        stub = wire.stub_of(channel)
        stream = stub.Unroll()
        await stream.write(wire.open_request("a"))
        await stream.read()
        with Connection(process.address) as connection:
            came = await asyncio.to_thread(lambda: any(each.kind == GOAWAY for each in connection.frames()))
            assert came
        # This took longer than the age; the stream is on an older connection.
        await stream.write(wire.chunk_request("a", 0, np.zeros((3, 12), np.float32)))
        answer: pb.UnrollResponse = await stream.read()  # type: ignore[assignment]  # or EOF
        assert answer.steps.count == 3
        await stub.GetModel(pb.GetModelRequest(model="jv"), timeout=PATIENCE)
        await stream.done_writing()
        assert await stream.read() is grpc.aio.EOF
        assert await stream.code() == grpc.StatusCode.OK


def test_a_client_that_pings_without_end_is_told_to_be_calm(server: ServerProcess) -> None:
    with Connection(server.address) as connection:
        connection.send(*(frame(PING, 0, 0, bytes(8)) for _ in range(100)))
        came = []
        for each in connection.frames():
            came.append(each)
            if each.kind == GOAWAY:
                break
    assert came[-1].kind == GOAWAY
    assert int.from_bytes(came[-1].payload[4:8], "big") == ENHANCE_YOUR_CALM


async def test_a_caller_that_does_not_read_its_answers_costs_itself(server: ServerProcess) -> None:
    values = random_values(4096, features=12)
    large = wire.classify_request(list(values[:, None]), return_final_states=True)
    small = wire.classify_request([values[:20]])
    async with grpc.aio.insecure_channel(server.address, [("grpc.max_receive_message_length", -1)]) as channel:
        stub = wire.stub_of(channel)
        expected = await stub.Classify(small, timeout=PATIENCE)
        size = (await stub.Classify(large, timeout=PATIENCE)).ByteSize()
        calls = CONNECTION_BYTES // size + 8
        before = resident_bytes(server.process.pid)
        with Connection(server.address, PREFACE + settings(initial_window_size=0)) as slow:

            def ended() -> dict[int, int]:
                """Returns, by stream, if its call has ended. Without a window only a refused call can end."""
                for stream in range(1, 2 * calls, 2):
                    assert slow.call(stream, CLASSIFY, large.SerializeToString())
                came: dict[int, int] = {}
                for each in slow.frames():
                    if each.kind == HEADERS:
                        came[each.stream] = each.flags & END_STREAM
                    if sum(came.values()) == calls - CONNECTION_BYTES // size:
                        break
                return came

            asking = asyncio.create_task(asyncio.to_thread(ended))
            while not asking.done():
                assert await stub.Classify(small) == expected
            assert sum((await asking).values()) == calls - CONNECTION_BYTES // size
            grown = resident_bytes(server.process.pid) - before
        assert await stub.Classify(small) == expected
    assert grown < 8 * CONNECTION_BYTES
