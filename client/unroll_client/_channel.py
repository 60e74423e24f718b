"""The channel to the servers: load balancing, retries, message sizes, TLS, credentials."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

import grpc

from unroll_proto.v1 import unroll_pb2 as pb

Metadata = tuple[tuple[str, str], ...]

_SERVICE = pb.DESCRIPTOR.services_by_name["UnrollService"].full_name

# These change nothing on the server, so asking again is safe. The stream is not among them.
_SERVICE_CONFIG = {
    "loadBalancingConfig": [{"round_robin": {}}],
    "methodConfig": [
        {
            "name": [{"service": _SERVICE, "method": method} for method in ("Classify", "ListModels", "GetModel")],
            "retryPolicy": {
                "maxAttempts": 5,
                "initialBackoff": "0.1s",
                "maxBackoff": "1s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        }
    ],
}

_OPTIONS: tuple[tuple[str, Any], ...] = (
    ("grpc.service_config", json.dumps(_SERVICE_CONFIG)),
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    # A call is only retried while its request is still in this buffer; the default, 256 KiB, is less than a batch.
    ("grpc.per_rpc_retry_buffer_size", 256 << 20),
    # How soon a replica that was started after one was lost is found; the default is 30 s.
    ("grpc.dns_min_time_between_resolutions_ms", 2000),
    # Each client has its own connections, so that closing one ends them.
    ("grpc.use_local_subchannel_pool", 1),
)

# What a target begins with that says by itself how it is resolved.
_SCHEME = re.compile(r"[a-z0-9-]+://|(dns|unix|unix-abstract|ipv4|ipv6|vsock):(?!\d+$)")


@dataclass(frozen=True, slots=True)
class Connection:
    """How to reach the servers.

    Attributes:
        target: "host:port", or any gRPC target. A name that resolves to several addresses is balanced over them.
        tls: Encrypt; also where certificates are given.
        root_certificates: PEM of the authorities to trust; the system's where absent.
        certificate: PEM of the client's own certificate and key, for mutual TLS.
        server_name: Name to expect in the server's certificate, where it is not the target's host.
        token: Sent as a bearer token with every call.
        metadata: Further metadata of every call.
    """

    target: str
    tls: bool = False
    root_certificates: bytes | None = None
    certificate: tuple[bytes, bytes] | None = None
    server_name: str | None = None
    token: str | None = None
    metadata: Metadata = ()

    def open(self) -> grpc.aio.Channel:
        """Makes the channel, on the running event loop; the connection itself is made by the first call."""
        target = self.target if _SCHEME.match(self.target) else f"dns:///{self.target}"
        options = list(_OPTIONS)
        if self.server_name is not None:
            options.append(("grpc.ssl_target_name_override", self.server_name))
        if not (self.tls or self.root_certificates or self.certificate):
            return grpc.aio.insecure_channel(target, options=options)
        chain, key = self.certificate or (None, None)
        credentials = grpc.ssl_channel_credentials(self.root_certificates, private_key=key, certificate_chain=chain)
        return grpc.aio.secure_channel(target, credentials, options=options)

    def call_metadata(self) -> Metadata:
        """The metadata of every call."""
        authorization = (("authorization", f"Bearer {self.token}"),) if self.token else ()
        return (*authorization, *self.metadata)
