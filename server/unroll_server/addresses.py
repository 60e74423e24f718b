"""Addresses to listen on: parsing, resolution, and a trial bind, so that an error names the cause."""

import errno
import ipaddress
import os
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, Self

from unroll_server.errors import StartupError

UNIX = "unix:"
LOOPBACK = ("127.0.0.1", "::1")
LONGEST_PATH = 107
"""Most bytes in the path of a Unix socket: Linux's limit without the final NUL."""
SOCKET_MODE = 0o660
"""Mode of a Unix socket: everyone who may write to it may connect."""
CONNECT_SECONDS = 1.0
"""Seconds to wait for a server that may listen on a Unix socket."""
WILDCARD = {socket.AF_INET: "0.0.0.0", socket.AF_INET6: "::"}  # noqa: S104
_NO_IPV6 = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)
_ONLY_IPV4_SECONDS = 1.0


class Address(NamedTuple):
    """An address to listen on.

    Attributes:
        option: The option, for errors.
        host: Name or IP address, an IPv6 one without brackets; empty for a Unix socket.
        port: 0 for a free one.
        path: Path of a Unix socket; empty for TCP.
    """

    option: str
    host: str = ""
    port: int = 0
    path: str = ""

    @classmethod
    def of(cls, option: str, value: str, unix: bool = True) -> Self:
        """Parses HOST:PORT or, if `unix`, unix:PATH.

        Raises:
            StartupError: it is neither.
        """
        expected = "HOST:PORT or unix:/PATH" if unix else "HOST:PORT"
        if unix and value.startswith(UNIX):
            path = value.removeprefix(UNIX)
            # unix:///PATH is gRPC's other way to write it.
            path = "/" + path.lstrip("/") if path.startswith("//") else path
            size = len(os.fsencode(path))
            if not path or "\0" in path:
                raise StartupError(f"{option}: {value!r} is not {expected}")
            if path.startswith("@"):
                raise StartupError(f"{option}: an abstract socket has no owner and no mode; use unix:/PATH")
            if size > LONGEST_PATH:
                limit = f"a Unix socket's has {LONGEST_PATH} at most; use a shorter one"
                raise StartupError(f"{option}: the path has {size} bytes, {limit}")
            return cls(option, path=path)
        host, separator, port = value.rpartition(":")
        if value.startswith("unix-abstract:"):
            raise StartupError(f"{option}: an abstract socket has no owner and no mode; use unix:/PATH")
        if not separator or not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
            raise StartupError(f"{option}: {value!r} is not {expected}")
        if host == "*":
            # Some systems resolve '*'.
            raise StartupError(
                f"{option}: '*' is not a host; use 0.0.0.0 (IPv4) or [::] (IPv4 and IPv6) for all addresses"
            )
        return cls(option, host.removeprefix("[").removesuffix("]"), int(port))

    def __str__(self) -> str:
        return f"{UNIX}{self.path}" if self.path else joined(self.host, self.port)

    @property
    def is_local(self) -> bool:
        """True if only this machine can reach it: a Unix socket or a loopback address."""
        if self.path or self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    def problem(self, reason: str) -> StartupError:
        """Returns the error for an address that can't be listened on."""
        return StartupError(f"{self.option}: can't listen on {self}: {reason}")

    def check(self) -> None:
        """Tries to listen on it.

        Raises:
            StartupError: it can't.
        """
        if self.path:
            with self.claimed_path():
                pass
        else:
            self.hosts()

    def hosts(self, shared: bool = False) -> list[str]:
        """Returns the IP addresses of the host, each of which can be listened on now.

        Addresses of a name that this machine lacks are left out, such as ::1 without IPv6. Without IPv6, `::` becomes
        0.0.0.0.

        Args:
            shared: True if other processes may share the port (SO_REUSEPORT).

        Raises:
            StartupError: it can't be listened on.
        """
        found: list[str] = []
        resolved = self._resolved()
        for family, address in resolved:
            try:
                try_to_bind(family, address, shared)
            except OSError as error:
                if error.errno in _NO_IPV6 and len(resolved) > 1:
                    continue
                if error.errno in _NO_IPV6 and address[0] == WILDCARD[socket.AF_INET6]:
                    return self._replace(host=WILDCARD[socket.AF_INET]).hosts(shared)
                raise self.problem(self._reason(error, address[0])) from None
            scope = address[3] if family == socket.AF_INET6 else 0
            found.append(f"{address[0]}%{scope}" if scope else address[0])
        if not found:
            raise self.problem(f"this machine has none of the addresses of {self.host!r}")
        return found

    def _resolved(self) -> list[tuple[socket.AddressFamily, tuple[Any, ...]]]:
        if self.host == "localhost":
            # Many systems resolve it to one address, and clients try the other one first.
            return [(family_of(host), _socket_address(host, self.port)) for host in LOOPBACK]
        try:
            found = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        except (OSError, UnicodeError) as error:
            if isinstance(error, socket.gaierror) and error.errno == socket.EAI_AGAIN:
                raise self.problem(f"the name service does not answer for the host {self.host!r}") from None
            raise self.problem(f"unknown host {self.host!r}") from None
        return list(dict.fromkeys((family, address) for family, _, _, _, address in found))

    def _reason(self, error: OSError, host: str) -> str:
        if error.errno == errno.EADDRINUSE:
            return f"port {self.port} is in use"
        if error.errno in _NO_IPV6:
            return f"{host} is not an address of this machine"
        if error.errno in (errno.EACCES, errno.EPERM):
            return f"no permission to listen on port {self.port}"
        return error.strerror or str(error)

    @contextmanager
    def claimed_path(self) -> Iterator[None]:
        """Removes a socket on which no server listens, before and after the context.

        Raises:
            StartupError: another server listens there, another kind of file is there, or no socket can be created.
        """
        path = Path(self.path)
        self._remove_stale(path)
        if not os.access(path.parent, os.W_OK | os.X_OK):
            reason = "is not a folder" if not path.parent.is_dir() else "can't be written"
            raise self.problem(f"{str(path.parent)!r} {reason}")
        yield
        with suppress(StartupError):
            self._remove_stale(path)

    def _remove_stale(self, path: Path) -> None:
        try:
            if not stat.S_ISSOCK(path.lstat().st_mode):
                raise self.problem("it exists and is not a socket")
            with socket.socket(socket.AF_UNIX) as probe:
                probe.settimeout(CONNECT_SECONDS)
                probe.connect(self.path)
        except FileNotFoundError:
            return
        except ConnectionRefusedError:
            # Left behind by a server that was killed.
            path.unlink(missing_ok=True)
        except (BlockingIOError, TimeoutError):
            raise self.problem("another server listens there") from None
        except OSError as error:
            raise self.problem(error.strerror or str(error)) from None
        else:
            raise self.problem("another server listens there")


def joined(host: str, port: int) -> str:
    """Returns HOST:PORT, with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _socket_address(host: str, port: int) -> tuple[Any, ...]:
    address, _, scope = host.partition("%")
    return (address, port, 0, int(scope or 0)) if ":" in host else (address, port)


def family_of(host: str) -> socket.AddressFamily:
    """Returns the family of an IP address."""
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def try_to_bind(family: socket.AddressFamily, address: tuple[Any, ...], shared: bool) -> None:
    """Binds a socket and closes it. Without `shared` it fails if any server listens there.

    Raises:
        OSError: it can't be bound.
    """
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT if shared else socket.SO_REUSEADDR, 1)
        if address[0] == WILDCARD[socket.AF_INET6]:
            probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        probe.bind(address)


@contextmanager
def reserved(address: Address) -> Iterator[tuple[list[str], int]]:
    """Reserves a port for processes that share it (SO_REUSEPORT), against those that do not.

    Yields:
        The IP addresses on which the port is held, and the port.

    Raises:
        StartupError: the address can't be listened on, or another server listens there.
    """
    hosts, port = address.hosts(), address.port
    with ExitStack() as held:
        for host in hosts:
            holder = held.enter_context(socket.socket(family_of(host), socket.SOCK_STREAM))
            holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            if host == WILDCARD[socket.AF_INET6]:
                holder.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            try:
                holder.bind(_socket_address(host, port))
            except OSError as error:
                raise address.problem(error.strerror or str(error)) from None
            port = holder.getsockname()[1]
        yield hosts, port


@contextmanager
def without_ipv6(host: str, port: int) -> Iterator[int]:
    """Prevents gRPC's core from also listening on IPv6 for 0.0.0.0.

    In the context the port is taken on IPv6, so that the core gets only IPv4. Processes that share a port take turns.

    Args:
        host: IP address that the core is about to listen on.
        port: Port; 0 picks a free one for 0.0.0.0.

    Yields:
        The port.
    """
    with ExitStack() as held:
        if host == WILDCARD[socket.AF_INET]:
            # Without IPv6 there is no port to take.
            with suppress(OSError):
                taker = held.enter_context(socket.socket(socket.AF_INET6, socket.SOCK_STREAM))
                taker.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                port = _bound(taker, port)
        yield port


def _bound(taker: socket.socket, port: int) -> int:
    """Binds a socket to all IPv6 addresses and returns the port; waits while another process holds it for a moment."""
    until = time.monotonic() + _ONLY_IPV4_SECONDS
    while True:
        try:
            taker.bind((WILDCARD[socket.AF_INET6], port))
        except OSError as error:
            if error.errno != errno.EADDRINUSE or time.monotonic() > until:
                raise
            time.sleep(0.001)
        else:
            return int(taker.getsockname()[1])
