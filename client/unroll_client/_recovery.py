"""Recovery: the attempts of a sequence to resume on another server after it lost its own."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

import grpc

from unroll_client._backoff import backoff
from unroll_client._client_api import ClientApi
from unroll_client._errors import (
    FailedPrecondition,
    InvalidArgument,
    PermissionDenied,
    ResourceExhausted,
    Unauthenticated,
    Unavailable,
    UnrollError,
)

_HOPELESS = (InvalidArgument, FailedPrecondition, PermissionDenied, Unauthenticated)


class Recovery:
    """Tries to resume on another server, with growing pauses, until it succeeds or makes no progress for too long.

    Args:
        api: The client.
        patience: Seconds without progress after a loss until it gives up; 0 to give up at once.
        go_on: Resumes on another server; raises UnrollError if that fails.
        give_up: Called with the error after which there is no further attempt.
        stopped: Called at the end, unless it ended by `cancel`.

    Attributes:
        lost: Error by which the sequence lost its server, or of the last attempt.
    """

    def __init__(
        self,
        api: ClientApi,
        patience: float,
        go_on: Callable[[], Awaitable[None]],
        give_up: Callable[[UnrollError], None],
        stopped: Callable[[], None],
    ) -> None:
        self.lost: UnrollError = Unavailable("the stream was lost")
        self._api = api
        self._patience = patience
        self._go_on = go_on
        self._give_up = give_up
        self._stopped = stopped
        self._task: asyncio.Task[None] | None = None
        self._give_up_at: float | None = None
        self._failures = 0

    def can_help(self, error: UnrollError) -> bool:
        """True if another server or a later attempt can help."""
        if self._patience <= 0 or self._api.closed:
            return False
        if isinstance(error, ResourceExhausted):
            return error.retry_after is not None
        return not isinstance(error, _HOPELESS) and error.code is not grpc.StatusCode.UNIMPLEMENTED

    def begin(self) -> None:
        """Starts the attempts, unless they run."""
        if self._task is None:
            self._task = self._api.spawn(self._run())
            self._task.add_done_callback(self._done)

    def got_on(self) -> None:
        """Records progress: a new answer arrived, or no answer is due. The patience starts over at the next loss."""
        self._give_up_at, self._failures = None, 0

    def cancel(self) -> None:
        """Ends the attempts, unless called by one."""
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
