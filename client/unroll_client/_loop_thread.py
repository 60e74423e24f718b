"""LoopThread: an event loop on a thread of its own, on which callers of other threads run coroutines."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from concurrent.futures import CancelledError, Future
from typing import Any, TypeVar

T = TypeVar("T")

# Seconds that tasks may take to end by themselves.
_LONGEST_END = 0.2

FORKED = (
    "the sequence belongs to the process that this one was forked from: take a snapshot before the fork, and open"
    " another sequence from it"
)


class LoopThread:
    """An event loop on a daemon thread, for callers of other threads."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        # Re-entrant, since a garbage collection within it can end a sequence or an answer of the same client.
        self._lock = threading.RLock()
        self._running = 0
        self._stopped = False
        self._forked = False
        self._thread = threading.Thread(target=self._serve, name="unroll-client", daemon=True)
        self._thread.start()

    @property
    def busy(self) -> bool:
        """True if a caller waits in `run`, or the thread itself asks."""
        return self._running > 0 or threading.current_thread() is self._thread

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Runs a coroutine and waits for its result; an interrupt of the wait cancels it."""
        return self.wait(self.begin(work))

    def begin(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Starts a coroutine, for `wait`.

        Raises:
            RuntimeError: the client is closed or belongs to another process, or this is the loop's own thread.
        """
        if threading.current_thread() is self._thread:
            work.close()
            raise RuntimeError("the client's own thread can't wait for itself")
        future = self._submit(work)
        with self._lock:
            self._running += 1
        return future

    def wait(self, future: Future[T]) -> T:
        """Waits for what `begin` started."""
        try:
            return future.result()
        except CancelledError:
            raise RuntimeError("the client was closed") from None
        except BaseException:
            future.cancel()
            raise
        finally:
            with self._lock:
                self._running -= 1

    def finish(self, work: Coroutine[Any, Any, object]) -> None:
        """Runs a coroutine that ends something, and waits for that, except on the thread of the loop.

        The garbage collector can run there and find a half-consumed generator of the caller's, for which the loop can't
        wait.
        """
        if threading.current_thread() is self._thread:
            self._submit(work)
        else:
            self.run(work)

    def abandon(self) -> None:
        """Refuses all work, in the child of the process that the thread runs in."""
        self._forked = True

    def stop(self, last: Coroutine[Any, Any, None]) -> None:
        """Runs `last`, then ends the loop and the thread; does nothing if called again."""
        with self._lock:
            if self._stopped:
                last.close()
                return
            self._stopped = True
        future = asyncio.run_coroutine_threadsafe(self._finish(last), self._loop)
        future.add_done_callback(lambda _: self._loop.call_soon_threadsafe(self._loop.stop))
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        if self._forked:  # First: the lock may be one that a thread of the parent holds.
            work.close()
            raise RuntimeError(FORKED)
        with self._lock:
            if self._stopped:
                work.close()
                raise RuntimeError("the client is closed")
            return asyncio.run_coroutine_threadsafe(work, self._loop)

    async def _finish(self, last: Coroutine[Any, Any, None]) -> None:
        await last
        mine = asyncio.current_task()
        others = [task for task in asyncio.all_tasks() if task is not mine]
        if others:
            # gRPC's own end by themselves, now that the channels are closed. Cancelled, they would leave events to a
            # closed loop, and loops of other clients complain about them.
            await asyncio.wait(others, timeout=_LONGEST_END)
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self._loop.shutdown_asyncgens()

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
        finally:
            self._loop.close()
