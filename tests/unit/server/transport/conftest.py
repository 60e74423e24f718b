"""Fixtures of the tests that hold the transports against each other."""

from collections.abc import AsyncIterator

import pytest
from support.scripted_calls import Side, serving
from support.transports import make_native

from unroll_server.transport.grpcio import GrpcioTransport


@pytest.fixture
async def sides() -> AsyncIterator[list[Side]]:
    """The native transport and grpcio's, with the same handlers."""
    async with serving(make_native) as native, serving(GrpcioTransport) as grpcio:
        yield [native, grpcio]
