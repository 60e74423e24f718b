"""Calls: unary calls to the servers of one client, retried if that can help and is safe."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from itertools import count
from typing import TypeVar

import grpc

from unroll_client import _fork
from unroll_client._backoff import backoff
from unroll_client._channel import Connection
from unroll_client._errors import ResourceExhausted, Unavailable, from_rpc_error
from unroll_client._servers import Server, Servers

# Attempts at each of several servers; gRPC itself makes as many at a single one.
TRIES = 5

# Seconds. gRPC counts nanoseconds in 63 bits: a longer timeout would be in the past.
LONGEST_TIMEOUT = 1e9

ResponseT = TypeVar("ResponseT")
Rpc = Callable[..., Awaitable[ResponseT]]
# Picks an RPC of a server.
Method = Callable[[Server], Rpc[ResponseT]]


class Calls:
    """Makes calls on one asyncio event loop. Deadlines are in seconds of `time.monotonic()`.

    Args:
        connection: Addresses and credentials of the servers.
        timeout: Default timeout of a call, in seconds.
        wait_for_ready: Wait within the timeout while no server is reachable, instead of failing.
        parent: Calls whose connections are used; None to make own ones.

    Attributes:
        metadata: Metadata of every call.
        timeout: As given.
        wait_for_ready: As given.
        retry_refused: False to raise the refusal of an overloaded server at once.
        closed: True once no more calls may be made.
    """

    def __init__(
        self, connection: Connection, timeout: float, wait_for_ready: bool, parent: Calls | None = None
    ) -> None:
        self.metadata = connection.call_metadata()
        self.timeout = timeout
        self.wait_for_ready = wait_for_ready
        self.retry_refused = True
        self.closed = False
        self._parent = parent
        self._connection = connection
        self._opened: Servers | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def servers(self) -> Servers:
        """Returns the servers; connects to them at the first call.

        Raises:
            RuntimeError: the client is closed, or belongs to another event loop.
        """
        self.check()
        if self._parent is not None:
            return self._parent.servers()
        if self._opened is None:
            # Not before the first call: a channel belongs to the event loop that runs when it is made.
            self._opened = Servers(self._connection)
        return self._opened

    def check(self) -> None:
        """Raises RuntimeError if no call can be made: the client is closed, or belongs to another loop or process."""
        _fork.check()
        if self.closed:
            raise RuntimeError("the client is closed")
        if self._loop is not (loop := asyncio.get_running_loop()):
            if self._loop is not None:
                raise RuntimeError("the client belongs to another event loop, that of its first call")
            self._loop = loop

    def deadline(self, timeout: float | None) -> float:
        """Returns the deadline of a call that begins now.

        Raises:
            RuntimeError: as in `check`.
        """
        self.check()
        return time.monotonic() + (self.timeout if timeout is None else timeout)

    async def close(self) -> None:
        """Closes the connections."""
        if self._opened is not None:
            await self._opened.close()
            self._opened = None

    async def make(
        self, method: Method[ResponseT], request: object, deadline: float, *, again: bool = True
    ) -> ResponseT:
        """Makes a call; repeats it after the pause that an overloaded server asks for.

        Args:
            method: Picks the RPC of a server.
            request: Request of the RPC.
            deadline: Time by which the call must be done.
            again: True if the call may be repeated on the next of several servers when one is lost.
        """
        while True:
            try:
                return await self.make_once(method, request, deadline, again=again)
            except ResourceExhausted as error:
                pause = error.retry_after
                if not self.retry_refused or pause is None or pause >= deadline - time.monotonic():
                    raise
            await asyncio.sleep(pause)

    async def make_repeatable(self, method: Method[ResponseT], request: object, deadline: float) -> ResponseT:
        """Makes a call that the server applies only once; repeats it even if the only server is lost."""
        for tries in count(1):
            try:
                return await self.make(method, request, deadline)
            except Unavailable:
                pause = backoff(tries)
                if tries == TRIES or self.closed or time.monotonic() + pause >= deadline:
                    raise
            await asyncio.sleep(pause)
        raise AssertionError

    async def make_once(
        self, method: Method[ResponseT], request: object, deadline: float, *, again: bool = True
    ) -> ResponseT:
        """Makes a call without the pauses of `make`; with `again`, tries the next of several servers if one is lost."""
        servers = self.servers()
        for tries in count(1):
            try:
                return await self._ask(method(servers.next()), request, deadline, wait=len(servers) == 1)
            except Unavailable:
                round_over = tries % len(servers) == 0
                pause = backoff(tries // len(servers)) if round_over else 0.0
                last = not again or len(servers) == 1 or (tries >= TRIES * len(servers) and not self.wait_for_ready)
                if last or self.closed or time.monotonic() + pause >= deadline:
                    raise
            await asyncio.sleep(pause)
        raise AssertionError

    async def _ask(self, method: Rpc[ResponseT], request: object, deadline: float, *, wait: bool) -> ResponseT:
        left = deadline - time.monotonic()
        try:
            return await method(
                request,
                timeout=None if left > LONGEST_TIMEOUT else max(left, 0.0),
                metadata=self.metadata,
                wait_for_ready=self.wait_for_ready and wait,
            )
        except grpc.aio.AioRpcError as failure:
            error = from_rpc_error(failure)
            if failure.code() is grpc.StatusCode.CANCELLED:
                # The client did not cancel it: a server's core ends calls like this while it shuts down.
                error = Unavailable(f"the server has cancelled the call: {error.message}")
            raise error from failure
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if self.closed and not (task and task.cancelling()):
                raise Unavailable("the client was closed") from None
            raise
