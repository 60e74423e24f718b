"""Fixtures of the server's unit tests: a call of an unknown caller."""

import sqlite3
from collections.abc import Iterator
from typing import Any

import pytest

from unroll_server import caller


@pytest.fixture(autouse=True)
def unknown_caller() -> Iterator[None]:
    """Sets a new call for every test."""
    token = caller.current.set(caller.Call())
    yield
    caller.current.reset(token)


@pytest.fixture(autouse=True)
def close_databases(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Closes the databases that stores of sessions left open; Python 3.13 warns of them."""
    left: list[sqlite3.Connection] = []
    connect = sqlite3.connect

    def remember(*arguments: Any, **options: Any) -> sqlite3.Connection:
        left.append(connect(*arguments, **options))
        return left[-1]

    monkeypatch.setattr(sqlite3, "connect", remember)
    yield
    for database in left:
        database.close()
