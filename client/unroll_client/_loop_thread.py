"""LoopThread: an event loop on its own thread, which runs coroutines for callers on other threads."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from concurrent.futures import CancelledError, Future
from typing import Any, TypeVar

T = TypeVar("T")

# Seconds that tasks may take to end on their own.
_LONGEST_END = 0.2

FORKED = (
    "the sequence belongs to the process that this one was forked from: take a snapshot before the fork, and open"
    " another sequence from it"
)


class LoopThread:
    """An event loop on a daemon thread, for callers of other threads."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        # Re-entrant: a garbage collection while it is held can end a sequence or an answer of the same client.
        self._lock = threading.RLock()
        self._running = 0
        self._stopped = False
        self._forked = False
        self._thread = threading.Thread(target=self._serve, name="unroll-client", daemon=True)
        self._thread.start()

    @property
    def busy(self) -> bool:
        """True while a caller waits in `run`, or if asked on the loop's own thread."""
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
        """Waits for the result of what `begin` started."""
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
        """Runs a coroutine that ends something and waits for it, except on the loop's own thread.

        The garbage collector can run there and find a half-consumed generator of the caller's, for which the loop
        can't wait.
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
        if self._forked:  # First of all, since a thread of the parent may hold the lock.
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
            # gRPC's own tasks end once the channels are closed. If cancelled, they would leave events to a
            # closed loop, which loops of other clients report as errors.
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
