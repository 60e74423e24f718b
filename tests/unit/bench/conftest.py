"""Fixtures: in-process servers of the client's tests."""

from unit.client.conftest import address, script, start

__all__ = ["address", "script", "start"]
