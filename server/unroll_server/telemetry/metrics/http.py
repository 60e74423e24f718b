"""Metrics over HTTP, for Prometheus."""

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from threading import Thread
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.registry import Collector

from unroll_server.addresses import Address, joined

_log = logging.getLogger(__name__)


@contextmanager
def served(address: Address | None, *collectors: Collector) -> Iterator[None]:
    """Serves metrics over HTTP in the context, on a separate thread.

    Args:
        address: HOST:PORT to listen on; None to serve none.
        collectors: Collectors of the metrics.

    Raises:
        StartupError: the address can't be listened on.
    """
    if address is None:
        yield
        return
    registry = CollectorRegistry()
    for collector in collectors:
        registry.register(collector)
    port = address.port
    with ExitStack() as running:
        for host in address.hosts():
            try:
                server, thread = start_http_server(port, host, registry)
            except OSError as error:
                raise address.problem(error.strerror or str(error)) from None
            running.callback(_end, server, thread)
            port = server.server_port
        _log.info("metrics on http://%s/metrics", joined(address.host, port))
        yield


def _end(server: WSGIServer, thread: Thread) -> None:
    server.shutdown()
    server.server_close()
    thread.join()
