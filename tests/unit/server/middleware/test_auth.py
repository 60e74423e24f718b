"""Removed tokens, and streams that are slow to end."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from unroll_server.errors import UnauthenticatedError
from unroll_server.identity.quotas import Quotas
from unroll_server.identity.tokens import Identities, digest_of
from unroll_server.middleware import Method
from unroll_server.middleware.auth import AuthMiddleware


class Caller:
    """The context of a call with a token."""

    def __init__(self, token: str) -> None:
        self._token = token

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        return (("authorization", f"Bearer {self._token}"),)


def write(file: Path, *tokens: str) -> None:
    entries = [f'[identities.{token}]\ntokens = ["sha256:{digest_of(token).hex()}"]\n' for token in tokens]
    draft = file.with_suffix(".new")
    draft.write_text("\n".join(entries))
    draft.replace(file)


async def test_a_stream_that_is_slow_to_end_delays_no_other(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    write(file, "alice", "bob")
    identities = Identities(file)
    auth = AuthMiddleware(identities, Quotas(identities))
    ending, may_end = asyncio.Event(), asyncio.Event()

    async def slow(opened: asyncio.Event, context: Any) -> None:
        opened.set()
        try:
            await asyncio.Event().wait()
        finally:
            ending.set()
            await may_end.wait()

    async def quick(opened: asyncio.Event, context: Any) -> None:
        opened.set()
        await asyncio.Event().wait()

    async def call(behavior: Any, token: str, opened: asyncio.Event) -> None:
        context: Any = Caller(token)
        await auth.wrap(Method("/m", True, True, behavior))(opened, context)

    both = [asyncio.Event(), asyncio.Event()]
    alice = asyncio.create_task(call(slow, "alice", both[0]))
    bob = asyncio.create_task(call(quick, "bob", both[1]))
    await asyncio.gather(*(opened.wait() for opened in both))
    write(file, "bob")
    identities.reload()
    auth.withdraw()
    await ending.wait()
    write(file)
    identities.reload()
    auth.withdraw()
    with pytest.raises(UnauthenticatedError):
        await bob
    may_end.set()
    with pytest.raises(UnauthenticatedError):
        await alice
