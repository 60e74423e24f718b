"""Fixture of the integration tests: a stub of the shared server."""

from collections.abc import AsyncIterator

import grpc
import grpc.aio
import pytest
from support import wire
from support.processes import ServerProcess

from unroll_proto.v1.unroll_pb2_grpc import UnrollServiceStub


@pytest.fixture
async def stub(server: ServerProcess) -> AsyncIterator[UnrollServiceStub]:
    async with grpc.aio.insecure_channel(server.address) as channel:
        yield wire.stub_of(channel)
