"""Fixtures of the integration tests: a stub of the shared server, and a web process for it."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import grpc
import grpc.aio
import pytest
from support import wire
from support.processes import ServerProcess, WebProcess, made_by_make

from unroll_proto.v1.unroll_pb2_grpc import UnrollServiceStub


@pytest.fixture
async def stub(server: ServerProcess) -> AsyncIterator[UnrollServiceStub]:
    async with grpc.aio.insecure_channel(server.address) as channel:
        yield wire.stub_of(channel)


@pytest.fixture(scope="session")
def web(server: ServerProcess, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebProcess]:
    """A web process for the shared server."""
    with WebProcess(server.address, tmp_path_factory.mktemp("web") / "log") as process:
        yield process
        assert process.stop() == 0, process.log


@pytest.fixture(scope="session")
def triton_python() -> Path:
    """Python of an environment with tritonclient and without Unroll."""
    return made_by_make(".venv-tritonclient") / "bin/python"
