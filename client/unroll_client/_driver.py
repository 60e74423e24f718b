"""Driver: runs an AsyncClient for callers of any thread, in the process that uses it."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from unroll_client import _fork
from unroll_client._async_client import AsyncClient
from unroll_client._loop_thread import LoopThread
from unroll_client._sequence import AsyncSequence

T = TypeVar("T")

# A child neither uses nor frees these: their sockets and epoll sets belong to the parent as well.
_parents: list[object] = []


class Driver:
    """An AsyncClient on a thread of its own.

    The first call creates the client and the thread. If no call is in flight when the process forks, they are closed;
    the next call creates new ones, in the parent and in the child.

    Args:
        make: Creates the client; called at once as well, so that bad arguments raise here.
    """

    def __init__(self, make: Callable[[], AsyncClient]) -> None:
        self._make = make
        self._client = make()
        self._thread: LoopThread | None = None
        self._sequences: weakref.WeakSet[AsyncSequence] = weakref.WeakSet()
        self._lock = threading.RLock()
        self._closed = False
        _fork.register(self)

    def run(self, call: Callable[[AsyncClient], Coroutine[Any, Any, T]]) -> T:
        """Makes a call of the client and waits for its result.

        Raises:
            RuntimeError: the client is closed.
        """
        with self._lock:  # Keeps a fork from closing the client while a call begins.
            thread = self._started()
            future = thread.begin(call(self._client))
        return thread.wait(future)

    def open(self, call: Callable[[AsyncClient], AsyncSequence]) -> tuple[LoopThread, AsyncSequence]:
        """Opens a sequence; returns the thread that it belongs to, and the sequence."""
        with self._lock:
            thread = self._started()
            sequence = call(self._client)
            self._sequences.add(sequence)
            future = thread.begin(sequence.open())
        return thread, thread.wait(future)

    def close(self) -> None:
        """Closes the client and ends the thread; does nothing if called again."""
        with self._lock:
            self._closed = True
            thread, self._thread = self._thread, None
        if thread is not None:
            thread.stop(self._client.close())

    def rest(self) -> None:
        """Closes the client if no call is in flight, so that the process can fork."""
        with self._lock:
            thread = self._thread
            if thread is None or thread.busy or not all(sequence.over for sequence in list(self._sequences)):
                return
            thread.stop(self._client.close())
            self._thread, self._client = None, self._make()

    def abandon(self) -> None:
        """Starts over, in the child of the process that used it."""
        self._lock = threading.RLock()  # A thread of the parent may hold the old lock.
        if self._thread is not None:
            self._thread.abandon()
            _parents.append((self._thread, self._client, list(self._sequences)))
            self._thread, self._client = None, self._make()
        self._sequences = weakref.WeakSet()

    def _started(self) -> LoopThread:
        if self._closed:
            raise RuntimeError("the client is closed")
        if self._thread is None:
            self._thread = LoopThread()
        return self._thread
