"""Metrics over HTTP, for Prometheus."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.registry import Collector

from unroll_server.errors import StartupError

_log = logging.getLogger(__name__)


@contextmanager
def served(address: tuple[str, int] | None, *collectors: Collector) -> Iterator[None]:
    """Serves metrics over HTTP, on a thread of its own, for as long as the context is open.

    Args:
        address: Host and port to listen on; port 0 picks a free one; None serves nothing.
        collectors: What is served.

    Raises:
        StartupError: the address can't be listened on.
    """
    if address is None:
        yield
        return
    registry = CollectorRegistry()
    for collector in collectors:
        registry.register(collector)
    host, port = address
    try:
        server, thread = start_http_server(port, host, registry)
    except OSError as error:
        raise StartupError(f"--metrics: can't listen on {host}:{port}: {error.strerror}") from None
    try:
        _log.info("metrics on http://%s:%d/metrics", f"[{host}]" if ":" in host else host, server.server_port)
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
