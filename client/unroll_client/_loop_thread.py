"""LoopThread: an event loop on a thread of its own, on which callers of other threads have coroutines run."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from concurrent.futures import CancelledError, Future
from typing import Any, TypeVar

T = TypeVar("T")


class LoopThread:
    """An event loop on a daemon thread, for callers of other threads."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        # Re-entrant, since a garbage collection within it can end a sequence or an answer of the same client.
        self._lock = threading.RLock()
        self._stopped = False
        self._thread = threading.Thread(target=self._serve, name="unroll-client", daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Runs a coroutine and waits for its result; an interrupt of the wait cancels it."""
        if threading.current_thread() is self._thread:
            work.close()
            raise RuntimeError("the client's own thread can't wait for itself")
        future = self._begin(work)
        try:
            return future.result()
        except CancelledError:
            raise RuntimeError("the client was closed") from None
        except BaseException:
            future.cancel()
            raise

    def finish(self, work: Coroutine[Any, Any, object]) -> None:
        """Runs a coroutine that ends something, and waits for that, except on the thread of the loop.

        It is called there where the garbage collector happens to run there and finds a generator of the caller's
        that was left half done: to wait would be to wait for oneself.
        """
        if threading.current_thread() is self._thread:
            self._begin(work)
        else:
            self.run(work)

    def _begin(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        with self._lock:
            if self._stopped:
                work.close()
                raise RuntimeError("the client is closed")
            return asyncio.run_coroutine_threadsafe(work, self._loop)

    def stop(self, last: Coroutine[Any, Any, None]) -> None:
        """Runs `last`, then ends the loop and the thread; does nothing when called again."""
        with self._lock:
            if self._stopped:
                last.close()
                return
            self._stopped = True
        future = asyncio.run_coroutine_threadsafe(self._finish(last), self._loop)
        future.add_done_callback(lambda _: self._loop.call_soon_threadsafe(self._loop.stop))
        if threading.current_thread() is not self._thread:
            self._thread.join()

    async def _finish(self, last: Coroutine[Any, Any, None]) -> None:
        await last
        mine = asyncio.current_task()
        others = [task for task in asyncio.all_tasks() if task is not mine]
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
