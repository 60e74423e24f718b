"""Transport by grpcio, with the server of grpc.aio."""

import asyncio
import os
from contextlib import ExitStack
from urllib.parse import quote

import grpc
import grpc.aio

from unroll_server.addresses import SOCKET_MODE, UNIX, Address, joined, without_ipv6
from unroll_server.config import Connections
from unroll_server.transport.limits import HANDSHAKE, METADATA, SHORTEST_PINGS
from unroll_server.transport.registry import Registry
from unroll_server.transport.tls import Certificates, Pem

PENDING = 50_000
"""Most calls that wait for Python, over all connections; cancelled ones count."""
LAST_CALLS = 1.0
"""Most seconds for which a draining server answers new calls with UNAVAILABLE."""
QUIET = 0.1
"""Seconds without a new call after which it stops doing so."""
GOAWAY = 1.0
"""Seconds that a draining server gives clients without calls in flight to close their connections."""


class GrpcioTransport:
    """A grpc.aio server.

    Args:
        address: The address to listen on.
        registry: The methods to serve.
        max_message_bytes: Size of the largest request message; a larger one is RESOURCE_EXHAUSTED.
        share_port: True if other processes listen on the same port, each with a share of the connections.
        connections: Limits of connections; None for the defaults.
        certificates: Certificates for TLS; None for plaintext.
    """

    name = "grpcio"

    def __init__(
        self,
        address: Address,
        registry: Registry,
        max_message_bytes: int,
        share_port: bool = False,
        connections: Connections | None = None,
        certificates: Certificates | None = None,
    ) -> None:
        self._address = address
        self._share_port = share_port
        self._claimed = ExitStack()
        self._certificates = certificates
        self._registry = registry
        self._server = grpc.aio.server(
            handlers=[registry],
            options=[
                ("grpc.max_receive_message_length", max_message_bytes),
                ("grpc.max_send_message_length", -1),
                # Two servers that share a port by accident would each get half of the calls.
                ("grpc.so_reuseport", int(share_port)),
                # A burst of calls waits; otherwise some would be CANCELLED from 1,000 on.
                ("grpc.server.max_pending_requests", PENDING),
                ("grpc.server.max_pending_requests_hard_limit", PENDING),
                *_limits(connections or Connections()),
            ],
        )

    async def start(self) -> str:
        """Listens and serves; returns the address, with the port that it got.

        Raises:
            StartupError: the address can't be listened on.
        """
        address = self._address
        if address.path:
            self._claimed.enter_context(address.claimed_path())
            umask = os.umask(0o777 & ~SOCKET_MODE)
            try:
                # The core decodes it as the path of a URI.
                self._listen_on(UNIX + quote(address.path))
            finally:
                os.umask(umask)
        else:
            port = address.port
            for host in address.hosts(self._share_port):
                with without_ipv6(host, port) as port:
                    port = self._listen_on(joined(host, port))
            address = address._replace(port=port)
        await self._server.start()
        return str(address)

    def _listen_on(self, target: str) -> int:
        try:
            if self._certificates is None:
                return self._server.add_insecure_port(target)
            return self._server.add_secure_port(target, _credentials(self._certificates))
        except RuntimeError as error:
            # The address was free and the certificates are good: only the core knows the reason.
            raise self._address.problem(" ".join(str(error).split())) from None

    async def stop(self, grace: float) -> bool:
        """Refuses new calls, waits for those in flight, and cancels those not done after `grace` seconds.

        A stopped core ends new calls with CANCELLED, the status of a caller that left. So new calls are answered with
        UNAVAILABLE until none arrives, and then the core is stopped.

        Returns:
            False if calls in flight were cancelled.
        """
        clock = asyncio.get_running_loop().time
        begin = clock()
        # Watchers end on their own and do not count as lost calls, even without grace.
        end = begin + max(grace, QUIET)
        while self._registry.turn_away() and clock() + QUIET < min(end, begin + LAST_CALLS):
            before = self._registry.turned_away
            await asyncio.sleep(QUIET)
            if self._registry.turned_away == before:
                break
        stopping = asyncio.create_task(self._server.stop(max(0.0, end - clock()) + GOAWAY))
        lost = False
        while not stopping.done():
            if calls := [*self._registry.in_flight]:
                if lost := clock() >= end:
                    break
                await asyncio.wait(calls, timeout=end - clock())
                continue
            # The core would wait 20 s for clients that do not answer GOAWAY, or do not speak HTTP/2 at all.
            await asyncio.wait({stopping}, timeout=GOAWAY)
            if not self._registry.in_flight:
                break
        await self._server.stop(0)
        await stopping
        self._claimed.close()
        return not lost


def _limits(connections: Connections) -> list[tuple[str, int]]:
    """Returns the limits as arguments of the core: grpc/impl/channel_arg_names.h."""
    limits = {
        "grpc.max_allowed_incoming_connections": connections.most,
        "grpc.max_concurrent_streams": connections.calls,
        # With it a call counts until Python has released it, after its caller has the answer; a client that keeps to
        # the limit then gets UNAVAILABLE for the next one. PENDING bounds the same memory.
        "grpc.http.overload_protection": 0,
        "grpc.keepalive_time_ms": _milliseconds(connections.keepalive),
        "grpc.keepalive_timeout_ms": _milliseconds(HANDSHAKE),
        "grpc.server_handshake_timeout_ms": _milliseconds(HANDSHAKE),
        # A client may keep an idle connection alive.
        "grpc.keepalive_permit_without_calls": 1,
        "grpc.http2.min_ping_interval_without_data_ms": _milliseconds(SHORTEST_PINGS),
        "grpc.max_metadata_size": METADATA,
        "grpc.absolute_max_metadata_size": METADATA,
    }
    if connections.age:
        # Calls in flight end normally, without a time limit.
        limits["grpc.max_connection_age_ms"] = _milliseconds(connections.age)
    return list(limits.items())


def _milliseconds(seconds: float) -> int:
    return min(int(seconds * 1000), 2**31 - 1)


def _credentials(certificates: Certificates) -> grpc.ServerCredentials:
    def fetch() -> grpc.ServerCertificateConfiguration | None:
        # The core asks before each handshake, on its own thread.
        fresh = certificates.renewed()
        return None if fresh is None else _configuration(fresh)

    return grpc.dynamic_ssl_server_credentials(
        _configuration(certificates.current),
        fetch,  # type: ignore[arg-type]  # None is right, and means no change
        require_client_authentication=certificates.asks_callers,
    )


def _configuration(pem: Pem) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration([(pem.key, pem.chain)], pem.client_ca)
