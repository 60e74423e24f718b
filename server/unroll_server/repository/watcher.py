"""When to look at the repository: every so often, and when a version that leaves has become free."""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable

_log = logging.getLogger(__name__)

LOOK_AGAIN = 1.0
"""Seconds between looks at versions that leave, where the repository is not polled."""


class Watcher:
    """Looks until it is closed. Used on one event loop.

    Args:
        poll: Seconds between looks at the folder; 0 for none.
        look: Looks at the folder.
        let_go: Lets go of versions that are free.
        anybody_leaves: Whether there are versions that leave.
    """

    def __init__(
        self,
        poll: float,
        look: Callable[[], Awaitable[None]],
        let_go: Callable[[], Awaitable[None]],
        anybody_leaves: Callable[[], bool],
    ) -> None:
        self._poll = poll
        self._look = look
        self._let_go = let_go
        self._anybody_leaves = anybody_leaves
        self._freed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begins to look."""
        self._task = asyncio.create_task(self._run())

    def wake(self) -> None:
        """Says that a version may be free, or that one leaves."""
        self._freed.set()

    def close(self) -> None:
        """Looks no more."""
        if self._task:
            self._task.cancel()

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        due = loop.time() + self._poll
        while True:
            pause = max(0.0, due - loop.time()) if self._poll else LOOK_AGAIN if self._anybody_leaves() else None
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._freed.wait()
            self._freed.clear()
            try:
                if self._poll and loop.time() >= due:
                    await self._look()
                    due = loop.time() + self._poll
                else:
                    await self._let_go()
            except Exception:
                _log.exception("the repository could not be brought up to date")
                due = loop.time() + self._poll
