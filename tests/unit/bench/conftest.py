"""Fixtures: the servers in this process of the client's tests."""

from unit.client.conftest import address, script, start

__all__ = ["address", "script", "start"]
