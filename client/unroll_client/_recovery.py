"""Recovery: when a sequence that lost its server looks for another, and how long."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

import grpc

from unroll_client._backoff import backoff
from unroll_client._errors import (
    FailedPrecondition,
    InvalidArgument,
    PermissionDenied,
    ResourceExhausted,
    Unauthenticated,
    Unavailable,
    UnrollError,
)
from unroll_client._host import Host

_HOPELESS = (InvalidArgument, FailedPrecondition, PermissionDenied, Unauthenticated)


class Recovery:
    """Tries to go on elsewhere, with growing pauses, until that succeeds or has brought nothing new for too long.

    Args:
        host: The client.
        patience: Seconds after a loss in which nothing new has come, and it gives up; 0: at once.
        go_on: Goes on elsewhere, or raises an UnrollError where that fails.
        give_up: Told why there will be no further try.
        stopped: Called when it has come to its end, whichever, but by `cancel`.

    Attributes:
        lost: Why the sequence lost its server, or could not go on at another.
    """

    def __init__(
        self,
        host: Host,
        patience: float,
        go_on: Callable[[], Awaitable[None]],
        give_up: Callable[[UnrollError], None],
        stopped: Callable[[], None],
    ) -> None:
        self.lost: UnrollError = Unavailable("the stream was lost")
        self._host = host
        self._patience = patience
        self._go_on = go_on
        self._give_up = give_up
        self._stopped = stopped
        self._task: asyncio.Task[None] | None = None
        self._give_up_at: float | None = None
        self._failures = 0

    def can_help(self, error: UnrollError) -> bool:
        """Whether another server, or another time, can help."""
        if self._patience <= 0 or self._host.closed:
            return False
        if isinstance(error, ResourceExhausted):
            return error.retry_after is not None
        return not isinstance(error, _HOPELESS) and error.code is not grpc.StatusCode.UNIMPLEMENTED

    def begin(self) -> None:
        """Begins, where it has not."""
        if self._task is None:
            self._task = self._host.spawn(self._run())
            self._task.add_done_callback(self._done)

    def got_on(self) -> None:
        """Takes note that the caller got on, or that nothing is missing any more: a loss after this is another one."""
        self._give_up_at, self._failures = None, 0

    def cancel(self) -> None:
        """Ends it, unless it is what asks."""
        if self._task is not None and self._task is not asyncio.current_task():
            self._task.cancel()

    async def _run(self) -> None:
        try:
            if self._give_up_at is None:
                self._give_up_at = time.monotonic() + self._patience
            while True:
                pause = max(backoff(self._failures) if self._failures else 0.0, self.lost.retry_after or 0.0)
                if not self.can_help(self.lost) or time.monotonic() + pause >= self._give_up_at:
                    self._give_up(self.lost)
                    return
                await asyncio.sleep(pause)
                self._failures += 1
                try:
                    await self._go_on()
                    return
                except UnrollError as error:
                    self.lost = error
        finally:
            self._task = None
            self._stopped()

    def _done(self, task: asyncio.Task[None]) -> None:
        if task.cancelled():
            self._give_up(self.lost)
