"""Runs the coroutines of hot methods without a task each."""

import asyncio
import types
from collections.abc import Callable, Coroutine, Generator
from contextvars import copy_context
from typing import Any

from unroll_engine.async_engine import JobEnd


class Run:
    """Runs a coroutine without a task while it waits only for jobs of the engine, and in a task from then on.

    Without a task, `start` runs it to its first wait, and the engine resumes it as it reports its job.

    Args:
        coroutine: The coroutine, which gets a copy of the current context variables.
        loop: The event loop.
    """

    __slots__ = ("_begun", "_context", "_coroutine", "_loop", "_task")

    def __init__(self, coroutine: Coroutine[Any, Any, None], loop: asyncio.AbstractEventLoop) -> None:
        self._coroutine = coroutine
        self._loop = loop
        self._context = copy_context()
        self._task: asyncio.Task[None] | None = None
        self._begun = False

    def start(self) -> None:
        """Runs the coroutine until it waits or ends."""
        self._step(self._coroutine.send, None)

    def cancel(self) -> None:
        """Cancels the coroutine, which has not ended."""
        if self._task:
            self._task.cancel()
        # A task that has not begun ends without a word to the coroutine.
        if not self._begun:
            self._step(self._coroutine.throw, asyncio.CancelledError())

    def _step(self, step: Callable[[Any], Any], value: Any) -> None:
        try:
            awaited = self._context.run(step, value)
        except (StopIteration, asyncio.CancelledError):
            return
        except Exception as error:
            self._loop.call_exception_handler({"message": "a call failed", "exception": error})
            return
        if isinstance(awaited, JobEnd):
            awaited.resume = self.start
        else:
            self._task = self._loop.create_task(self._rest(awaited), context=self._context)

    @types.coroutine
    def _rest(self, awaited: Any) -> Generator[Any, Any, None]:
        """Runs the rest of the coroutine, which waits for a future, or for the next turn of the loop if it is None."""
        self._begun = True
        while True:
            step: Callable[[Any], Any] = self._coroutine.send
            value = None
            try:
                yield awaited
            except BaseException as error:
                step, value = self._coroutine.throw, error
            try:
                awaited = step(value)
            except StopIteration:
                return
