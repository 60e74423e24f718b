"""Models: cache of the served model versions; concurrent lookups of one version share a request."""

from __future__ import annotations

import asyncio
import copy
import math
import time
from collections.abc import Callable, Coroutine
from typing import Any

from unroll_client._errors import DeadlineExceeded, Unavailable
from unroll_client._types import ModelInfo

# Asks a server for a model version before a deadline in seconds of time.monotonic().
Ask = Callable[[str, int, float], Coroutine[Any, Any, ModelInfo]]


class Models:
    """Model versions by the name and version that were asked for, on the running event loop.

    Args:
        ask: Asks a server.
        parent: Models whose cache is shared; None for an empty one.
    """

    def __init__(self, ask: Ask, parent: Models | None = None) -> None:
        self._ask = ask
        self._known: dict[tuple[str, int], ModelInfo] = {} if parent is None else parent._known
        self._lookups: dict[tuple[str, int], asyncio.Task[ModelInfo]] = {}

    def get(self, name: str, version: int) -> ModelInfo | None:
        """Returns a cached version; None if it is unknown."""
        return self._known.get((name, version))

    def any(self) -> ModelInfo | None:
        """Returns some cached version; None if there is none."""
        return next(iter(self._known.values()), None)

    def remember(self, name: str, version: int, info: ModelInfo) -> None:
        """Caches the answer for a name and version; version 0 stands for the newest."""
        self._known[name, version] = self._known[info.name, info.version] = info

    def forget(self) -> None:
        """Clears the cache, which may be outdated."""
        self._known.clear()

    async def find(self, name: str, version: int, deadline: float) -> ModelInfo:
        """Returns a version from the cache, or asks for it before a deadline in seconds of `time.monotonic()`.

        Raises:
            UnrollError: the call failed.
        """
        while (known := self.get(name, version)) is None:
            lookup = self._lookup((name, version), deadline)
            left = deadline - time.monotonic()
            # A caller that stops waiting leaves the lookup to the others.
            await asyncio.wait([lookup], timeout=None if math.isinf(left) else max(left, 0.0))
            if lookup.cancelled():
                raise Unavailable("the client was closed")
            error = lookup.exception() if lookup.done() else None
            if lookup.done() and error is None:
                return lookup.result()
            if deadline <= time.monotonic():
                raise DeadlineExceeded("Deadline Exceeded")
            # The deadline that passed may have been another caller's.
            if error is not None and not isinstance(error, DeadlineExceeded):
                raise copy.copy(error)
        return known

    async def close(self) -> None:
        """Cancels the lookups."""
        lookups = list(self._lookups.values())
        for lookup in lookups:
            lookup.cancel()
        await asyncio.gather(*lookups, return_exceptions=True)

    def _lookup(self, key: tuple[str, int], deadline: float) -> asyncio.Task[ModelInfo]:
        lookup = self._lookups.get(key)
        if lookup is None:
            lookup = self._lookups[key] = asyncio.create_task(self._ask(*key, deadline))
            lookup.add_done_callback(lambda task: self._ended(key, task))
        return lookup

    def _ended(self, key: tuple[str, int], lookup: asyncio.Task[ModelInfo]) -> None:
        del self._lookups[key]
        if not lookup.cancelled():
            lookup.exception()  # If all callers have left, asyncio must not warn of an exception that nobody retrieved.
