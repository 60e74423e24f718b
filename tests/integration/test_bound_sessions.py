"""Sessions that are bound to a connection, on real servers: they end when it closes, however it does, and only then."""

import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.operators import metrics_address
from support.processes import ServerProcess
from support.raw_http2 import END_STREAM, GOAWAY, Connection, frame
from support.redis_server import RedisServer, needs_redis
from support.waiting import wait_until

from unroll_client import Client, FailedPrecondition, InvalidArgument, NotFound, UnrollError
from unroll_proto.v1 import unroll_pb2 as pb
from unroll_server.transport import native

pytestmark = pytest.mark.skipif(native.unavailable_reason() is not None, reason="there is no native transport")

STEPS = np.zeros((2, 12), np.float32)
NAMES = "abc"
ADVANCE = "/unroll.v1.UnrollService/Advance"


def exists(client: Client, session_id: str) -> bool:
    """Returns True if there is such a session, and leaves it as it is."""
    # A session that exists refuses a chunk far ahead of it.
    with pytest.raises((FailedPrecondition, NotFound)) as caught:
        client.advance(session_id, STEPS, first_step=2**40)
    assert caught.value.reason in ("", "SESSION_UNKNOWN")
    return isinstance(caught.value, FailedPrecondition)


class Caller:
    """A caller with a connection of its own, which it can leave in any way."""

    def __init__(self, address: str) -> None:
        self.connection = Connection(address)
        self._stream = -1

    def start(self, session_id: str, bound: bool, waits: bool = True) -> None:
        request = pb.AdvanceRequest(session_id=session_id, model="jv", start=True, bound=bound, values=STEPS.tobytes())
        self._stream += 2
        assert self.connection.call(self._stream, ADVANCE, request.SerializeToString())
        if waits:
            assert any(each.stream == self._stream and each.flags & END_STREAM for each in self.connection.frames())

    def leave(self, how: str) -> None:
        if how == "goaway":
            self.connection.send(frame(GOAWAY, 0, 0, bytes(8)))
        elif how == "reset":
            self.connection.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.socket.close()


@pytest.fixture(params=["memory", "workers", pytest.param("redis", marks=needs_redis)])
def addresses(request: pytest.FixtureRequest, bundle_root: Path, tmp_path: Path) -> Iterator[tuple[str, str]]:
    """Addresses for callers and an observer: of a server, of one with two workers, of two replicas with a Redis."""
    with ExitStack() as stack:
        options: tuple[str, ...] = ()
        if request.param == "memory":
            server = request.getfixturevalue("server")
            yield server.address, server.address
            return
        if request.param == "workers":
            options = ("--workers", "2")
        else:
            options = ("--sessions", stack.enter_context(RedisServer(tmp_path)).url)
        servers = [
            stack.enter_context(ServerProcess(bundle_root, tmp_path / f"log{number}", *options))
            for number in range(1 if request.param == "workers" else 2)
        ]
        yield servers[0].address, servers[-1].address
        for server in servers:
            assert server.stop() == 0, server.log


class Callers:
    """Callers, and the sessions that they should have left.

    Args:
        address: Server of the callers.
        observer: Another client, which asks which sessions there are, and advances and ends them.
        prefix: Prefix of all ids.
    """

    def __init__(self, address: str, observer: Client, prefix: str) -> None:
        self._address = address
        self._observer = observer
        self._prefix = prefix
        self._callers: dict[int, Caller] = {}
        # The caller that each session is bound to.
        self._live: dict[str, Caller | None] = {}
        self._hasty = 0

    def start(self, number: int, name: str, bound: bool) -> None:
        caller = self._caller(number)
        caller.start(self._prefix + name, bound)
        self._live[name] = caller if bound else None

    def advance(self, name: str) -> None:
        if name in self._live:
            self._observer.advance(self._prefix + name, STEPS)

    def end(self, name: str) -> None:
        if name in self._live:
            del self._live[name]
            self._observer.advance(self._prefix + name, end=True)

    def leave(self, number: int, how: str) -> None:
        caller = self._callers.pop(number, None)
        if caller is not None:
            caller.leave(how)
            for name in [name for name, bound in self._live.items() if bound is caller]:
                del self._live[name]
                self._wait_until_gone(name)

    def start_and_leave(self, number: int, how: str) -> None:
        self._hasty += 1
        self._caller(number).start(f"{self._prefix}hasty {self._hasty}", bound=True, waits=False)
        self.leave(number, how)

    def check(self) -> None:
        assert {name for name in NAMES if exists(self._observer, self._prefix + name)} == set(self._live)

    def close(self) -> None:
        for number in [*self._callers]:
            self.leave(number, "close")
        self.check()
        for number in range(self._hasty):
            self._wait_until_gone(f"hasty {number + 1}")

    def _caller(self, number: int) -> Caller:
        if number not in self._callers:
            self._callers[number] = Caller(self._address)
        return self._callers[number]

    def _wait_until_gone(self, name: str) -> None:
        wait_until(lambda: not exists(self._observer, self._prefix + name), lambda: f"{name} is still there")


WAYS = st.sampled_from(["close", "reset", "goaway"])
NUMBERS = st.integers(0, 1)
ACTIONS = st.one_of(
    st.tuples(st.just(Callers.start), NUMBERS, st.sampled_from(NAMES), st.booleans()),
    st.tuples(st.just(Callers.advance), st.sampled_from(NAMES)),
    st.tuples(st.just(Callers.end), st.sampled_from(NAMES)),
    st.tuples(st.just(Callers.leave), NUMBERS, WAYS),
    st.tuples(st.just(Callers.start_and_leave), NUMBERS, WAYS),
)


def test_bound_sessions_end_with_their_connections_and_no_others_do(addresses: tuple[str, str]) -> None:
    examples = count()
    with Client(addresses[1], model="jv") as observer:

        @settings(max_examples=20)
        @given(actions=st.lists(ACTIONS, min_size=4, max_size=20))
        def check(actions: list[tuple[Any, ...]]) -> None:
            callers = Callers(addresses[0], observer, f"{next(examples)} ")
            try:
                for action, *arguments in actions:
                    action(callers, *arguments)
                callers.check()
            finally:
                callers.close()

        check()


CHILD = """
import sys
import numpy as np
from unroll_client import Client
client = Client(sys.argv[1], model="jv")
client.advance("child's", np.zeros((2, 12), np.float32), start=True, bound=True)
print("started", flush=True)
sys.stdin.read()
"""


def test_a_killed_client_leaves_no_bound_session(server: ServerProcess) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", CHILD, server.address], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"started\n"
        with Client(server.address, model="jv") as observer:
            assert observer.advance("child's", STEPS).step == 4
            child.send_signal(signal.SIGKILL)
            wait_until(lambda: not exists(observer, "child's"))


def test_bound_sessions_end_with_an_old_connection_and_with_the_server(bundle_root: Path, tmp_path: Path) -> None:
    options = ("--sessions-file", str(tmp_path / "sessions"), "--metrics", "127.0.0.1:0")
    tuning = {"max_connection_age": 1, "max_steps": 4}
    with ServerProcess(bundle_root, tmp_path / "log", *options, tuning=tuning) as server:
        with Client(server.address, model="jv") as client, Client(server.address, model="jv") as other:
            # In three requests, of which the first starts the session.
            done = client.advance("s", np.zeros((10, 12), np.float32), start=True, bound=True, return_snapshot=True)
            assert done.step == 10
            # It is idle from now on, until its connection is too old.
            wait_until(lambda: not exists(other, "s"))
            with pytest.raises(InvalidArgument, match="bound: only a session that starts"):
                client.advance("s", STEPS, bound=True)
            with urlopen(f"http://{metrics_address(server)}/metrics") as page:
                assert 'unroll_sessions_total{outcome="disconnected"} 1.0' in page.read().decode()
            # A snapshot outlives the connection.
            assert client.advance("fork", STEPS, start=True, snapshot=done.snapshot).first_step == 10
            caller = Caller(server.address)
            with caller.connection:
                caller.start("kept open", bound=True)
                assert server.stop() == 0, server.log
        assert "saved 1 sessions" in server.log


def test_a_transport_that_reports_no_closed_connection_binds_no_session(bundle_root: Path, tmp_path: Path) -> None:
    with (
        ServerProcess(bundle_root, tmp_path / "log", "--transport", "grpcio") as server,
        Client(server.address, model="jv") as client,
    ):
        with pytest.raises(UnrollError, match=r"bound: .*--transport native") as caught:
            client.advance("s", STEPS, start=True, bound=True)
        assert caught.value.code.name == "UNIMPLEMENTED"
        assert not exists(client, "s")
