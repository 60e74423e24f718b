"""Fixtures of the integration tests: a stub of the shared server, and a web process for it."""

import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import grpc
import grpc.aio
import pytest
from support import wire
from support.processes import PATIENCE, ServerProcess, WebProcess

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
    root = Path(__file__).parents[2]
    made = subprocess.run(
        ["make", f"PYTHON={Path(sys.executable).resolve()}", ".venv-tritonclient/done"],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=5 * PATIENCE,
        check=False,
    )
    assert made.returncode == 0, made.stdout + made.stderr
    return root / ".venv-tritonclient/bin/python"
