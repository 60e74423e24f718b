"""Fixtures of the client's tests: in-process servers."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from unit.client.harness import BINARY, MODEL, TWO_LAYERS, LocalServer, ScriptedServer

from unroll_engine.models.loader import Model
from unroll_proto.v1 import unroll_pb2_grpc


@pytest.fixture(scope="session")
def address() -> Iterator[str]:
    """A server of three models that no test breaks."""
    server = LocalServer(MODEL, TWO_LAYERS, BINARY)
    yield server.address
    server.stop()


@pytest.fixture
def start() -> Iterator[Callable[..., LocalServer]]:
    """Starts servers that a test can break."""
    servers: list[LocalServer] = []

    def launch(*models: Model, **options: Any) -> LocalServer:
        servers.append(LocalServer(*(models or (MODEL,)), **options))
        return servers[-1]

    yield launch
    for server in servers:
        server.stop()


@pytest.fixture
def script() -> Iterator[Callable[[unroll_pb2_grpc.UnrollServiceServicer], str]]:
    """Starts servers of other servicers; returns their addresses."""
    servers: list[ScriptedServer] = []

    def launch(servicer: unroll_pb2_grpc.UnrollServiceServicer) -> str:
        servers.append(ScriptedServer(servicer))
        return servers[-1].address

    yield launch
    for server in servers:
        server.stop()
