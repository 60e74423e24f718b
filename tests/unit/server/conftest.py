"""What every test of the server's rooms begins with: a call of nobody's."""

from collections.abc import Iterator

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
