"""Polling for conditions that no event reports."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from inspect import isawaitable

from support.processes import PATIENCE

INTERVAL = 0.002
"""Seconds between two checks."""


async def until(condition: Callable[[], bool | Awaitable[bool]], report: Callable[[], object] = lambda: "") -> None:
    """Waits until a condition holds, which another task, thread or process brings about.

    Args:
        condition: Returns True once it holds; a coroutine function if that takes a call.
        report: Returns the text of the error if the condition never holds, such as a log.

    Raises:
        AssertionError: it does not hold within PATIENCE seconds.
    """
    deadline = time.monotonic() + PATIENCE
    while True:
        holds = condition()
        if await holds if isawaitable(holds) else holds:
            return
        assert time.monotonic() < deadline, report()
        await asyncio.sleep(INTERVAL)


def wait_until(condition: Callable[[], bool], report: Callable[[], object] = lambda: "") -> None:
    """Waits as `until` does, and blocks the thread."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, report()
        time.sleep(INTERVAL)
