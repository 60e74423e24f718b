"""Channels to the servers: load balancing, retries, message sizes, TLS, credentials."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence as Listing
from dataclasses import dataclass, field, replace
from typing import Any

import grpc

from unroll_client._tracing import tracing
from unroll_proto.v1 import unroll_pb2 as pb

Metadata = tuple[tuple[str, str], ...]

_SERVICE = pb.DESCRIPTOR.services_by_name["UnrollService"].full_name

# These methods change nothing on the server, so a retry is safe. The stream is not among them.
_BALANCING: dict[str, Any] = {"loadBalancingConfig": [{"round_robin": {}}]}
_RETRYING = {
    "methodConfig": [
        {
            "name": [{"service": _SERVICE, "method": method} for method in ("Classify", "ListModels", "GetModel")],
            "retryPolicy": {
                "maxAttempts": 5,
                "initialBackoff": "0.1s",
                "maxBackoff": "1s",
                "backoffMultiplier": 2,
                # CANCELLED by the server, see _calls.py; a call that the caller cancels is never retried.
                "retryableStatusCodes": ["UNAVAILABLE", "CANCELLED"],
            },
        }
    ],
}

_OPTIONS: tuple[tuple[str, Any], ...] = (
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    # A call is retried only while its request fits this buffer; the default of 256 KiB is less than a batch.
    ("grpc.per_rpc_retry_buffer_size", 256 << 20),
    # Time until a new replica is found after one was lost; the default is 30 s.
    ("grpc.dns_min_time_between_resolutions_ms", 2000),
    # Time until a replica that restarts at the same address is found; the defaults are 1 s, growing to 120 s.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2000),
    # Timeout of a connection attempt, despite its name; the default is 20 s.
    ("grpc.min_reconnect_backoff_ms", 5000),
    # Keepalive pings, in milliseconds, detect a lost machine while calls are open.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
    # Each client has its own connections, so that closing one ends them.
    ("grpc.use_local_subchannel_pool", 1),
)

# The scheme of a target names gRPC's resolver.
_SCHEME = re.compile(r"(dns|unix|unix-abstract|ipv4|ipv6|vsock|xds|google-c2p):(?!\d+$)")
_ADDRESS = re.compile(r"(\[[0-9A-Fa-f:.]+(%[\w.-]+)?\]|[^\s:/@?#\[\]]+):(\d{1,5})")
# Characters that gRPC and HTTP/2 headers can carry.
_TOKEN = re.compile(r"[\x21-\x7e]+")
_METADATA_KEY = re.compile(r"[0-9a-z_.-]+")
_METADATA_VALUE = re.compile(r"[\x20-\x7e]*")


def targets_of(target: str | Listing[str]) -> tuple[str, ...]:
    """Parses the addresses of servers. "a:1,b:2" are two targets; a list after "ipv4:" is one target of gRPC's.

    Raises:
        ValueError: there is none, or one is neither HOST:PORT nor a target of gRPC's.
    """
    listed = [target] if isinstance(target, str) else list(target)
    found = []
    for each in listed:
        found += [each] if _SCHEME.match(each) else [part.strip() for part in each.split(",")]
    if not found or not all(found):
        raise ValueError(f"target: an address is missing in {target!r}")
    for address in found:
        parts = _ADDRESS.fullmatch(address)
        if not _SCHEME.match(address) and not (parts and 1 <= int(parts[3]) < 1 << 16):
            hint = "; encryption is a separate option, tls" if address.startswith(("https:", "grpcs:")) else ""
            raise ValueError(f"target: HOST:PORT or unix:/PATH expected, got {address!r}{hint}")
    return tuple(dict.fromkeys(found))


@dataclass(frozen=True, slots=True)
class Connection:
    """Connection settings.

    Attributes:
        targets: "host:port" each, or any gRPC target. A name that resolves to several addresses is balanced over
            them.
        tls: Encrypt; implied by certificates.
        root_certificates: PEM of the authorities to trust; None for the system's.
        certificate: PEM of the client's own certificate and key, for mutual TLS.
        server_name: Name to expect in the server's certificate, if it is not the target's host.
        token: Sent as a bearer token with every call.
        metadata: Further metadata of every call.
    """

    targets: tuple[str, ...]
    tls: bool = False
    root_certificates: bytes | None = None
    # Secrets are left out of the representation, so that none reaches a log.
    certificate: tuple[bytes, bytes] | None = field(default=None, repr=False)
    server_name: str | None = None
    token: str | None = field(default=None, repr=False)
    metadata: Metadata = field(default=(), repr=False)

    def __post_init__(self) -> None:
        if self.token and not _TOKEN.fullmatch(self.token):
            raise ValueError("token: only visible ASCII characters can be sent")
        for key, value in self.metadata:
            if not _METADATA_KEY.fullmatch(key):
                raise ValueError(f"metadata: a key of small letters, digits, '-', '_' and '.' expected, got {key!r}")
            if not key.endswith("-bin") and not _METADATA_VALUE.fullmatch(value):
                # The value itself may be a secret.
                raise ValueError(f"metadata: {key}: only printable ASCII characters can be sent")

    def with_metadata(self, metadata: Listing[tuple[str, str]]) -> Connection:
        """Returns these settings with more metadata, which replaces entries, and a token, of the same keys.

        Raises:
            ValueError: the metadata can't be sent.
        """
        keys = {key for key, _ in metadata}
        kept = tuple(entry for entry in self.metadata if entry[0] not in keys)
        token = None if "authorization" in keys else self.token
        return replace(self, token=token, metadata=(*kept, *metadata))

    def open(self) -> list[grpc.aio.Channel]:
        """Makes a channel to each target, on the running event loop; connections are made by the first calls."""
        return [self._open(target) for target in self.targets]

    def _open(self, target: str) -> grpc.aio.Channel:
        target = target if _SCHEME.match(target) else f"dns:///{target}"
        # With several targets, the next one is better than a retry.
        config = _BALANCING if len(self.targets) > 1 else _BALANCING | _RETRYING
        options = [("grpc.service_config", json.dumps(config)), *_OPTIONS]
        traced = tracing()
        interceptors = [traced] if traced else None
        if self.server_name is not None:
            options.append(("grpc.ssl_target_name_override", self.server_name))
        if not (self.tls or self.root_certificates or self.certificate):
            return grpc.aio.insecure_channel(target, options=options, interceptors=interceptors)
        chain, key = self.certificate or (None, None)
        credentials = grpc.ssl_channel_credentials(self.root_certificates, private_key=key, certificate_chain=chain)
        return grpc.aio.secure_channel(target, credentials, options=options, interceptors=interceptors)

    def call_metadata(self) -> Metadata:
        """Returns the metadata of every call."""
        authorization = (("authorization", f"Bearer {self.token}"),) if self.token else ()
        return (*authorization, *self.metadata)
