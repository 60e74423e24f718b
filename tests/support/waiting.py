"""Waits for conditions that nothing reports."""

import asyncio
from collections.abc import Callable

from support.processes import PATIENCE


async def until(condition: Callable[[], bool]) -> None:
    """Waits until a condition holds, which another task or thread brings about.

    Raises:
        TimeoutError: it does not hold within PATIENCE seconds.
    """
    async with asyncio.timeout(PATIENCE):
        while not condition():  # noqa: ASYNC110 (an asyncio.Event belongs to one thread)
            await asyncio.sleep(0.001)
