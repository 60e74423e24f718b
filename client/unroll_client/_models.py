"""Models: what is remembered of the model versions that are served; a lookup is shared by all who wait for it."""

from __future__ import annotations

import asyncio
import copy
import math
import time
from collections.abc import Callable, Coroutine
from typing import Any

from unroll_client._errors import DeadlineExceeded, Unavailable
from unroll_client._types import ModelInfo

# Asks a server for a model version by a time of time.monotonic().
Ask = Callable[[str, int, float], Coroutine[Any, Any, ModelInfo]]


class Models:
    """Model versions by the name and version that were asked for, on the running event loop.

    Args:
        ask: Asks a server.
    """

    def __init__(self, ask: Ask) -> None:
        self._ask = ask
        self._known: dict[tuple[str, int], ModelInfo] = {}
        self._lookups: dict[tuple[str, int], asyncio.Task[ModelInfo]] = {}

    def get(self, name: str, version: int) -> ModelInfo | None:
        """Returns a remembered version."""
        return self._known.get((name, version))

    def any(self) -> ModelInfo | None:
        """One of those that are remembered."""
        return next(iter(self._known.values()), None)

    def remember(self, name: str, version: int, info: ModelInfo) -> None:
        """Keeps what was answered for a name and version, 0 among them."""
        self._known[name, version] = self._known[info.name, info.version] = info

    def forget(self) -> None:
        """Remembers nothing, since it may be what is wrong."""
        self._known.clear()

    async def find(self, name: str, version: int, deadline: float) -> ModelInfo:
        """A model version, from memory where it was asked for before, by a time of time.monotonic().

        Raises:
            UnrollError: the call failed.
        """
        while (known := self.get(name, version)) is None:
            lookup = self._lookup((name, version), deadline)
            left = deadline - time.monotonic()
            # Whoever stops waiting leaves the lookup to the others.
            await asyncio.wait([lookup], timeout=None if math.isinf(left) else max(left, 0.0))
            if lookup.cancelled():
                raise Unavailable("the client was closed")
            error = lookup.exception() if lookup.done() else None
            if lookup.done() and error is None:
                return lookup.result()
            if deadline <= time.monotonic():
                raise DeadlineExceeded("Deadline Exceeded")
            # The deadline that passed can have been another caller's.
            if error is not None and not isinstance(error, DeadlineExceeded):
                raise copy.copy(error)
        return known

    async def close(self) -> None:
        """Ends the lookups."""
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
            lookup.exception()  # Those who wanted to know may all have gone, which is no reason for a warning.
