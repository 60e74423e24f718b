"""The transports that tests of the wire run on."""

import pytest

BOTH = [
    pytest.mark.usefixtures("transport"),
    pytest.mark.parametrize("transport", ["native", "grpcio"], indirect=True, scope="session"),
]
"""A module's `pytestmark`: its tests run on each transport. Its own fixtures of servers ask for `transport` too."""
