"""Addresses to listen on: parsing, errors, and shared ports."""

import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from unroll_server.addresses import LONGEST_PATH, Address, reserved
from unroll_server.errors import StartupError
from unroll_server.middleware.access_log import CallObserver
from unroll_server.telemetry.metrics import Metrics, served
from unroll_server.transport.grpcio import GrpcioTransport
from unroll_server.transport.registry import Registry

NO_METHODS = Registry(CallObserver(Metrics()))


def address(value: str) -> Address:
    return Address.of("--listen", value)


def listening(host: str, port: int, *, shared: bool) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, reuse_port=shared)


def has_ipv6() -> bool:
    try:
        listening("::1", 0, shared=False).close()
    except OSError:
        return False
    return True


def reached(port: int) -> list[str]:
    """Returns the loopback addresses on which a server listens."""
    found = []
    for host in ("127.0.0.1", "::1"):
        with suppress(ConnectionRefusedError):
            socket.create_connection((host, port), timeout=30).close()
            found.append(host)
    return found


@contextmanager
def a_socket_at(path: Path, *, listens: bool) -> Iterator[None]:
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        if listens:
            other.listen()
        yield


@pytest.mark.parametrize(
    "value",
    ["", "50051", ":50051", "host:", "host:-1", "host:65536", "host:http", "host:٣", "*:1", "unix:", "unix:/a\0b"],
)
@pytest.mark.parametrize("option", ["--listen", "--metrics", "--admin"])
def test_an_address_that_is_none_is_refused(option: str, value: str) -> None:
    with pytest.raises(StartupError, match=f"^{option}: .* is not (HOST:PORT|a host; use 0.0.0.0)"):
        Address.of(option, value, unix=option != "--metrics")


@pytest.mark.parametrize(
    ("value", "host", "port", "path", "local"),
    [
        ("127.0.0.1:0", "127.0.0.1", 0, "", True),
        ("[::1]:65535", "::1", 65535, "", True),
        ("localhost:1", "localhost", 1, "", True),
        ("0.0.0.0:1", "0.0.0.0", 1, "", False),  # noqa: S104
        ("unix:/run/a b.sock", "", 0, "/run/a b.sock", True),
        ("unix:///run/x", "", 0, "/run/x", True),
        ("unix:x:1", "", 0, "x:1", True),
    ],
)
def test_an_address_is_taken_apart(value: str, host: str, port: int, path: str, local: bool) -> None:
    read = address(value)
    assert (read.host, read.port, read.path, read.is_local) == (host, port, path, local)
    assert address(str(read)) == read


@pytest.mark.parametrize("value", ["unix:@name", "unix-abstract:name", f"unix:/{'x' * LONGEST_PATH}"])
def test_sockets_without_rights_or_room_are_refused(value: str) -> None:
    with pytest.raises(StartupError, match=r"--listen: (an abstract socket has no owner|the path has 108 bytes)"):
        address(value)


async def listen_on(wanted: Address) -> None:
    """Listens like the option of the address; --workers stands for --listen with several processes."""
    if wanted.option == "--metrics":
        with served(wanted, Metrics()):
            raise AssertionError
    if wanted.option == "--workers":
        with reserved(wanted):
            raise AssertionError
    await GrpcioTransport(wanted, NO_METHODS, 1000).start()


@pytest.mark.parametrize("option", ["--listen", "--admin", "--metrics", "--workers"])
@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("name.invalid:50051", "unknown host 'name.invalid'"),
        (f"{'x' * 70}.invalid:50051", "unknown host 'x"),
        ("203.0.113.1:50051", "203.0.113.1 is not an address of this machine"),
        ("taken", "port {port} is in use"),
    ],
)
async def test_what_is_wrong_with_an_address_is_said(option: str, value: str, reason: str) -> None:
    with listening("127.0.0.1", 0, shared=True) as other:
        port = other.getsockname()[1]
        wrong = Address.of(option, f"127.0.0.1:{port}" if value == "taken" else value)
        expected = f"^{option}: can't listen on .*:{wrong.port}: {reason.format(port=port)}"
        with pytest.raises(StartupError, match=expected):
            await listen_on(wrong)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may listen on any port")
def test_a_port_for_the_privileged_is_told_apart() -> None:
    with pytest.raises(StartupError, match=r"no permission to listen on port 1$"):
        address("127.0.0.1:1").hosts()


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize(
    ("host", "reaches"),
    [
        ("127.0.0.1", ["127.0.0.1"]),
        ("[::1]", ["::1"]),
        ("localhost", ["127.0.0.1", "::1"]),
        ("0.0.0.0", ["127.0.0.1"]),  # noqa: S104
        ("[::]", ["127.0.0.1", "::1"]),
    ],
)
@pytest.mark.skipif(not has_ipv6(), reason="no IPv6 here")
async def test_one_process_and_several_listen_alike(host: str, reaches: list[str], processes: int) -> None:
    if processes == 1:
        transport = GrpcioTransport(address(f"{host}:0"), NO_METHODS, 1000)
        port = address(await transport.start()).port
        assert reached(port) == reaches
        await transport.stop(0)
        return
    with reserved(address(f"{host}:0")) as (_, port):
        transports = [
            GrpcioTransport(address(f"{host}:{port}"), NO_METHODS, 1000, share_port=True) for _ in range(processes)
        ]
        for transport in transports:
            assert address(await transport.start()).port == port
        assert reached(port) == reaches
        for transport in transports:
            await transport.stop(0)


@pytest.mark.skipif(not has_ipv6(), reason="no IPv6 here")
def test_metrics_are_served_on_each_address_of_a_name(caplog: pytest.LogCaptureFixture) -> None:
    for host in ("localhost", "[::]"):
        with caplog.at_level("INFO"), served(address(f"{host}:0"), Metrics()):
            port = int(caplog.messages[-1].removesuffix("/metrics").rpartition(":")[2])
            assert reached(port) == ["127.0.0.1", "::1"]


async def test_a_unix_socket_is_for_owner_and_group_and_gone_afterwards(tmp_path: Path) -> None:
    path = tmp_path / "a %41 socket"
    with a_socket_at(path, listens=False):
        pass
    transport = GrpcioTransport(address(f"unix:{path}"), NO_METHODS, 1000)
    umask = os.umask(0)
    try:
        assert await transport.start() == f"unix:{path}"
    finally:
        assert os.umask(umask) == 0
    assert stat.S_IMODE(path.stat().st_mode) == 0o660
    with pytest.raises(StartupError, match=r"--admin: can't listen on unix:.*: another server listens there"):
        await GrpcioTransport(Address.of("--admin", f"unix:{path}"), NO_METHODS, 1000).start()
    with socket.socket(socket.AF_UNIX) as still:
        still.connect(str(path))
    await transport.stop(0)
    assert not path.exists()


@pytest.mark.parametrize(
    ("at", "reason"), [("file", "it exists and is not a socket"), ("none/x", "'.*none' is not a folder")]
)
async def test_what_is_no_socket_is_left_alone(tmp_path: Path, at: str, reason: str) -> None:
    (tmp_path / "file").write_text("precious")
    with pytest.raises(StartupError, match=f"--listen: can't listen on unix:.*: {reason}"):
        await GrpcioTransport(address(f"unix:{tmp_path / at}"), NO_METHODS, 1000).start()
    assert (tmp_path / "file").read_text() == "precious"


def test_a_socket_on_which_another_listens_stays(tmp_path: Path) -> None:
    path = tmp_path / "x"
    with a_socket_at(path, listens=True), pytest.raises(StartupError, match="another server listens there"):
        address(f"unix:{path}").claimed_path().__enter__()
    assert path.is_socket()


def test_a_reserved_port_is_for_those_who_share_it() -> None:
    with reserved(address("127.0.0.1:0")) as (hosts, port):
        assert hosts == ["127.0.0.1"]
        with listening("127.0.0.1", port, shared=True), listening("127.0.0.1", port, shared=True):
            pass
        with pytest.raises(OSError, match="in use"):
            listening("127.0.0.1", port, shared=False)


def test_two_reservations_exclude_each_other() -> None:
    with reserved(address("127.0.0.1:0")) as (_, port):
        taken = address(f"127.0.0.1:{port}")
        with pytest.raises(StartupError, match=f"port {port} is in use"), reserved(taken):
            raise AssertionError
        with reserved(address("127.0.0.1:0")) as (_, other):
            assert other != port
    with reserved(taken) as (_, again):
        assert again == port


def test_a_reserved_port_gets_no_connections_itself() -> None:
    with reserved(address("127.0.0.1:0")) as (_, port), pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=30)


def test_a_name_stands_for_all_its_addresses() -> None:
    with reserved(address("localhost:0")) as (hosts, port):
        assert hosts == ["127.0.0.1", "::1"][: 1 + has_ipv6()]
        for host in hosts:
            with pytest.raises(OSError, match="in use"):
                listening(host, port, shared=False)
