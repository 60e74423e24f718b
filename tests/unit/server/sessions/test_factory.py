"""Stores that can't be opened: one line, without secrets."""

from pathlib import Path

import pytest
from support.settings import SETTINGS

from unroll_server.errors import StartupError
from unroll_server.sessions.factory import open_store


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sessions": "memcached://x"}, "--sessions: neither memory nor"),
        ({"sessions": "redis://:secret@host:port/0"}, "--sessions: expected memory"),
        ({"sessions": "redis://host/0", "sessions_file": Path("/tmp/x")}, "--sessions-file"),  # noqa: S108
        ({"sessions_file": Path("/no/such/folder/x")}, "--sessions-file: can't write /no/such/folder/x"),
    ],
)
async def test_a_store_that_cannot_be_opened_is_reported_in_one_line_without_secrets(
    options: dict[str, object], message: str
) -> None:
    with pytest.raises(StartupError, match=message) as caught:
        open_store(SETTINGS.replace(**options))
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)
