"""How a port is reserved for workers, and what they and their supervisor say to each other."""

import asyncio
import os
import signal
import socket
import sys
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import pytest
from support.processes import PATIENCE
from support.settings import SETTINGS

from unroll_server import supervisor
from unroll_server.control import FD, Channel, Orders
from unroll_server.errors import StartupError
from unroll_server.supervisor import reserved


def listening(host: str, port: int, *, shared: bool) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, reuse_port=shared)


def refused(host: str, port: int) -> AbstractContextManager[object]:
    return pytest.raises(StartupError, match=f"--listen: can't listen on {host}:{port}")


def has_ipv6() -> bool:
    try:
        listening("::1", 0, shared=False).close()
    except OSError:
        return False
    return True


def test_a_reserved_port_is_for_those_who_share_it() -> None:
    with reserved("127.0.0.1", 0) as (hosts, port):
        assert hosts == ["127.0.0.1"]
        with listening("127.0.0.1", port, shared=True), listening("127.0.0.1", port, shared=True):
            pass
        with pytest.raises(OSError, match="in use"):
            listening("127.0.0.1", port, shared=False)


def test_two_reservations_exclude_each_other() -> None:
    with reserved("127.0.0.1", 0) as (_, port):
        with (
            pytest.raises(StartupError, match=f"--listen: can't listen on 127.0.0.1:{port}"),
            reserved("127.0.0.1", port),
        ):
            raise AssertionError
        with reserved("127.0.0.1", 0) as (_, other):
            assert other != port
    with reserved("127.0.0.1", port) as (_, again):
        assert again == port


@pytest.mark.parametrize("shared", [False, True])
def test_a_port_on_which_another_listens_is_refused(shared: bool) -> None:
    with listening("127.0.0.1", 0, shared=shared) as other:
        port = other.getsockname()[1]
        with (
            pytest.raises(StartupError, match=f"--listen: can't listen on 127.0.0.1:{port}"),
            reserved("127.0.0.1", port),
        ):
            raise AssertionError


def test_a_reserved_port_gets_no_connections_itself() -> None:
    with reserved("127.0.0.1", 0) as (_, port), pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=30)


def test_a_name_stands_for_all_its_addresses() -> None:
    with reserved("localhost", 0) as (hosts, port):
        assert "127.0.0.1" in hosts
        for host in hosts:
            with pytest.raises(OSError, match="in use"):
                listening(host, port, shared=False)


@pytest.mark.skipif(not has_ipv6(), reason="no IPv6 here")
def test_ipv6_is_reserved_too() -> None:
    with reserved("::1", 0) as (hosts, _):
        assert hosts == ["::1"]


@pytest.mark.parametrize("host", ["name.invalid", "203.0.113.1"])
def test_an_address_that_is_not_ours_is_refused(host: str) -> None:
    with refused(host, 50051), reserved(host, 50051):
        raise AssertionError


async def test_orders_arrive_as_they_were_given() -> None:
    ours, theirs = socket.socketpair()
    supervisor, worker = await Channel.on(ours), await Channel.on(theirs)
    orders = Orders(replace(SETTINGS, models=Path("/a\nb")), 3, Path("/folder"))
    supervisor.send(**orders.to_message())
    supervisor.send(drain=True)
    worker.send(failed="--models: \n ü")
    message = await worker.receive()
    assert message is not None
    assert Orders.from_message(message) == orders
    assert await worker.receive() == {"drain": True}
    assert await supervisor.receive() == {"failed": "--models: \n ü"}
    supervisor.close()
    assert await worker.receive() is None
    worker.send(serving="nobody listens")
    await worker.flush()
    worker.close()


WORKER = f"""#!{sys.executable}
import os, socket
channel = socket.socket(fileno=int(os.environ["{FD}"]))
channel.makefile().readline()
channel.sendall(b'{{"serving": "m/1"}}\\n')
channel.recv(1)
"""


async def test_a_worker_that_can_t_be_started_for_a_while_is_started_when_it_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the kernel, out of memory, kills a worker and has none for the next one."""
    monkeypatch.setattr(supervisor, "FIRST_DELAY", 0.01)
    program, away = tmp_path / "worker", tmp_path / "away"
    program.write_text(WORKER)
    program.chmod(0o700)
    worker = supervisor._Worker(Orders(SETTINGS, 0, tmp_path), ["127.0.0.1"], 0, None)
    worker._command = [str(program)]
    assert await worker.start() == "m/1"
    keeping = asyncio.create_task(worker.keep())
    try:
        async with asyncio.timeout(PATIENCE):
            program.rename(away)
            assert worker.pid is not None
            os.kill(worker.pid, signal.SIGKILL)
            while worker.restarts < 2:  # noqa: ASYNC110 - nobody tells
                await asyncio.sleep(0.01)
            assert worker.pid is None
            away.rename(program)
            while worker.pid is None:  # noqa: ASYNC110 - nobody tells
                await asyncio.sleep(0.01)
    finally:
        keeping.cancel()
        await asyncio.gather(keeping, return_exceptions=True)
        await worker.kill()


async def test_what_can_t_be_started_at_all_says_so_in_one_line(tmp_path: Path) -> None:
    worker = supervisor._Worker(Orders(SETTINGS, 0, tmp_path), ["127.0.0.1"], 0, None)
    worker._command = [str(tmp_path / "none")]
    with pytest.raises(StartupError, match=r"^a worker can't be started: No such file or directory$"):
        await worker.start()
