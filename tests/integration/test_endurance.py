"""The server's memory after many connections and many calls."""

import os
import resource
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from support import wire
from support.memory import resident_bytes
from support.processes import ServerProcess
from support.raw_http2 import (
    DATA,
    END_HEADERS,
    END_STREAM,
    GREETING,
    HEADERS,
    RST_STREAM,
    Connection,
    cancellation,
    frame,
    header_block,
    message,
)
from support.transports import BOTH
from support.values import random_values

pytestmark = BOTH

CONNECTIONS = 10_000
CONNECTION_BYTES = 64 * 2**10
"""Memory of an idle connection, at most; TCP's own buffers are the kernel's."""
CALLS = int(os.environ.get("UNROLL_TEST_CALLS", "20000"))
"""Calls that leave nothing; a million by hand."""
KEPT_BYTES = 16 * 2**20
"""Growth that is an allocator's, however many calls there were."""
A_CONNECTION = 400
"""Calls of one connection, of which a tenth is reset at once: more would be a flood."""


@pytest.fixture(scope="module")
def process(bundle_root: Path, tmp_path_factory: pytest.TempPathFactory, transport: str) -> Iterator[ServerProcess]:
    """A server for this module alone."""
    log = tmp_path_factory.mktemp("endurance") / "log"
    with ServerProcess(bundle_root, log, tuning={"max_connections": CONNECTIONS + 100}) as process:
        yield process
        assert process.stop() == 0, process.log
        assert "Traceback" not in process.log


def call(path: str, *messages: bytes) -> tuple[bytes, bytes]:
    """The payloads of a call's frames: its headers, its messages."""
    return header_block(path), b"".join(map(message, messages))


def kinds() -> list[tuple[bytes, bytes, bool]]:
    """Calls that are answered, refused, streamed and left: headers, messages, and whether the call is reset at once."""
    service = "/unroll.v1.UnrollService"
    values = random_values(5, features=12)
    good = wire.classify_request([values]).SerializeToString()
    unknown = wire.classify_request([values], model="nobody").SerializeToString()
    keys = ["a", "b"]
    stream = [*(wire.open_request(key) for key in keys), wire.chunks_request(keys, [0, 0], [values[:2]] * 2)]
    stream += [wire.chunk_request("a", 2, values[2:]), wire.snapshot_request("a"), wire.close_request("b")]
    return [
        *[(*call(f"{service}/Classify", good), False)] * 5,
        (*call(f"{service}/Classify", unknown), False),
        (*call(f"{service}/Classify", b"\xff"), False),
        (*call(f"{service}/Nothing", good), False),
        (*call(f"{service}/Unroll", *(each.SerializeToString() for each in stream)), False),
        (*call(f"{service}/Classify", good), True),
    ]


def run(address: str, count: int) -> None:
    """Makes so many calls, and waits for the end of each that is not reset."""
    made = kinds()
    for begin in range(0, count, A_CONNECTION):
        with Connection(address, GREETING) as connection:
            for first in range(0, min(A_CONNECTION, count - begin), 50):
                streams = range(2 * first + 1, 2 * (first + 50) + 1, 2)
                pieces, waiting = [], set()
                for number, stream in enumerate(streams):
                    headers, messages, resets = made[number % len(made)]
                    pieces.append(frame(HEADERS, END_HEADERS, stream, headers))
                    pieces.append(frame(DATA, END_STREAM, stream, messages))
                    if resets:
                        pieces.append(cancellation(stream))
                    else:
                        waiting.add(stream)
                connection.send(*pieces)
                for came in connection.frames():
                    if came.kind == RST_STREAM or (came.kind in (HEADERS, DATA) and came.flags & END_STREAM):
                        waiting.discard(came.stream)
                    if not waiting:
                        break
                assert not waiting


def test_calls_leave_nothing(process: ServerProcess) -> None:
    run(process.address, 4000)
    before = resident_bytes(process.process.pid)
    run(process.address, CALLS)
    assert resident_bytes(process.process.pid) - before < KEPT_BYTES


def test_idle_connections_cost_little_and_others_are_served(process: ServerProcess) -> None:
    """Each idle connection has made one call."""
    if resource.getrlimit(resource.RLIMIT_NOFILE)[0] < CONNECTIONS + 500:
        pytest.skip(f"fewer than {CONNECTIONS + 500} files can be open here")
    headers, messages, _ = kinds()[0]
    request = frame(HEADERS, END_HEADERS, 1, headers) + frame(DATA, END_STREAM, 1, messages)
    with ExitStack() as stack:
        before = resident_bytes(process.process.pid)
        connections = [stack.enter_context(Connection(process.address, GREETING + request)) for _ in range(CONNECTIONS)]
        for connection in connections:
            assert any(came.kind == HEADERS and came.flags & END_STREAM for came in connection.frames())
        assert resident_bytes(process.process.pid) - before < CONNECTIONS * CONNECTION_BYTES
        run(process.address, 100)
        assert connections[0].is_alive()
        assert connections[-1].is_alive()
