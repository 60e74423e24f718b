"""Ends sessions with the connections that they are bound to."""

import asyncio
import secrets
from collections.abc import Callable
from contextlib import suppress

from unroll_engine.errors import RequestError
from unroll_proto.v1.session_pb2 import Session
from unroll_server.sessions.store import Store


class _Binding:
    """What is bound to one connection: the token that its sessions have, and the writes that start more of them."""

    def __init__(self) -> None:
        self.token = secrets.token_bytes(16)
        self.writes: set[asyncio.Task[bool]] = set()


class Bindings:
    """Ends the sessions that are bound to a connection when it closes.

    A connection is a future that is done when it closes. Only the store knows which sessions are bound to it, by its
    token, so that any process can advance, replace and end them. If the store does not answer, or this process is
    killed, they expire.

    Args:
        store: Keeps the sessions.
        count: Called with "disconnected" for each session that ended with its connection.
    """

    def __init__(self, store: Store, count: Callable[[str], None]) -> None:
        self._store = store
        self._count = count
        self._bindings: dict[asyncio.Future[None], _Binding] = {}
        self._releases: set[asyncio.Task[None]] = set()

    def token_of(self, connection: asyncio.Future[None]) -> bytes:
        """Returns the token of a connection, which no other connection to any server has.

        Raises:
            asyncio.CancelledError: it has closed, so that nobody waits for an answer.
        """
        return self._of(connection).token

    async def put(self, connection: asyncio.Future[None], session: Session, before: bytes | None) -> bool:
        """Starts a session that is bound to a connection; see Store.put.

        A cancelled call leaves the write running, so that the session can't be stored after its connection's others
        have ended.

        Raises:
            asyncio.CancelledError: the connection has closed.
        """
        binding = self._of(connection)
        write = asyncio.create_task(self._store.put(session, before))
        binding.writes.add(write)
        write.add_done_callback(binding.writes.discard)
        return await asyncio.shield(write)

    async def close(self) -> None:
        """Ends all sessions that are bound to a connection."""
        for connection in [*self._bindings]:
            self._release(connection)
        await asyncio.gather(*self._releases)

    def _of(self, connection: asyncio.Future[None]) -> _Binding:
        if connection.done():
            raise asyncio.CancelledError
        if (binding := self._bindings.get(connection)) is None:
            binding = self._bindings[connection] = _Binding()
            connection.add_done_callback(self._release)
        return binding

    def _release(self, connection: asyncio.Future[None]) -> None:
        if binding := self._bindings.pop(connection, None):
            release = asyncio.create_task(self._end(binding))
            self._releases.add(release)
            release.add_done_callback(self._releases.discard)

    async def _end(self, binding: _Binding) -> None:
        if binding.writes:
            await asyncio.wait(binding.writes)
        # The store logs that it does not answer.
        with suppress(RequestError):
            while ended := await self._store.remove_bound(binding.token):
                for _ in range(ended):
                    self._count("disconnected")
                # The store in memory does not wait, but other calls must.
                await asyncio.sleep(0)
