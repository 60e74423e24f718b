"""Transports for tests of the wire."""

from collections.abc import Callable
from typing import Any

import pytest

from unroll_server.transport import Transport, native
from unroll_server.transport.grpcio import GrpcioTransport

BOTH = [
    pytest.mark.usefixtures("transport"),
    pytest.mark.parametrize("transport", ["native", "grpcio"], indirect=True, scope="session"),
]
"""A module's `pytestmark` for tests on each transport. Its server fixtures must also use `transport`."""

MakeTransport = Callable[..., Transport]


def make_native(*arguments: Any) -> Transport:
    """Makes a native transport; skips if it is not compiled."""
    if reason := native.unavailable_reason():
        pytest.skip(reason)
    from unroll_server.transport.native.transport import NativeTransport

    return NativeTransport(*arguments)


MAKERS = pytest.mark.parametrize("make", [make_native, GrpcioTransport], ids=["native", "grpcio"])
"""A module's `pytestmark` for tests with a `make: MakeTransport` of each transport."""
