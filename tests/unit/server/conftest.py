"""What every test of the server's rooms begins with: a call of nobody's."""

import sqlite3
from collections.abc import Iterator
from typing import Any

import pytest

from unroll_server import caller


@pytest.fixture(autouse=True)
def unknown_caller() -> Iterator[None]:
    """What a test takes note of about its caller, on no event loop, is not there in the next one."""
    request_id, identity, watched = caller.request_id.set(""), caller.identity.set(""), caller.watched.set(None)
    yield
    caller.request_id.reset(request_id)
    caller.identity.reset(identity)
    caller.watched.reset(watched)


@pytest.fixture(autouse=True)
def close_databases(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Closes what stores of sessions left open, as a process that ends does; Python 3.13 warns of it."""
    left: list[sqlite3.Connection] = []
    connect = sqlite3.connect

    def remember(*arguments: Any, **options: Any) -> sqlite3.Connection:
        left.append(connect(*arguments, **options))
        return left[-1]

    monkeypatch.setattr(sqlite3, "connect", remember)
    yield
    for database in left:
        database.close()
