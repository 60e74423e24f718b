"""The task that keeps a repository up to date: polls its folder and unloads drained versions."""

import asyncio
import contextlib
import logging

from unroll_server.repository.catalog import Catalog
from unroll_server.repository.repository import Repository

_log = logging.getLogger(__name__)

SESSIONS_POLL = 1.0
"""Seconds between counts of the sessions on draining versions, if the folder is not polled."""


class Watcher:
    """Watches a repository from `start` to `close`. Used on one event loop.

    Args:
        repository: The repository.
        catalog: Its versions.
        poll: Seconds between scans of the folder; 0 for none.
    """

    def __init__(self, repository: Repository, catalog: Catalog, poll: float) -> None:
        self._repository = repository
        self._catalog = catalog
        self._poll = poll
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Starts the task."""
        self._task = asyncio.create_task(self._run())

    def close(self) -> None:
        """Stops the task, if it was started."""
        if self._task:
            self._task.cancel()

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        due = loop.time() + self._poll
        while True:
            pause = SESSIONS_POLL if self._catalog.draining else None
            if self._poll:
                pause = max(0.0, due - loop.time())
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._catalog.idle.wait()
            self._catalog.idle.clear()
            try:
                if self._poll and loop.time() >= due:
                    await self._repository.refresh(patient=True)
                    due = loop.time() + self._poll
                else:
                    await self._repository.unload_drained()
            except Exception:
                _log.exception("the repository could not be refreshed")
                due = loop.time() + self._poll
