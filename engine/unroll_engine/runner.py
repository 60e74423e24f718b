"""Runs jobs in the threads of their callers."""

import asyncio
import threading
import time
from collections import deque

from unroll_engine.core import EngineCore, deliver
from unroll_engine.errors import InternalError
from unroll_engine.jobs import Job
from unroll_engine.models.loader import Model
from unroll_engine.observer import NoMetrics

_TICK_STEPS = 32


class Runner:
    """Drives an EngineCore without a thread of its own. Its methods can be called from any thread.

    If several threads call at once, one runs the ticks of all, so that their sequences share them.

    Args:
        model: The model of all jobs.
        max_lanes: Most sequences in one tick on one thread.
        threads: Threads that the kernel computes on.
    """

    def __init__(self, model: Model, max_lanes: int, threads: int) -> None:
        self._model = model
        self._threads = threads
        self._max_lanes = max_lanes
        # The lock is for the thread that runs ticks; the inbox is for jobs of all threads.
        self._lock = threading.Lock()
        self._inbox: deque[Job] = deque()
        self._running: set[Job] = set()
        self._core: EngineCore | None = self._new_core()

    def run(self, job: Job) -> None:
        """Runs ticks until a job is over or cancelled, those of other threads' jobs included.

        Raises:
            RuntimeError: the runner is closed.
        """
        self._inbox.append(job)
        with self._lock:
            core = self._core
            if core is None:
                raise RuntimeError("the engine is closed")
            try:
                while not (job.over or job.cancelled):
                    while self._inbox:
                        new = self._inbox.popleft()
                        self._running.add(new)
                        core.add(new, time.monotonic())
                    if core.prepare(time.monotonic()) is not None:
                        core.run()
                    deliver(core.events())
                if job.cancelled:
                    core.cancel(job)
                self._running.discard(job)
            except BaseException:
                # An interrupt, such as Jupyter's stop button, can leave lanes half written.
                self._core = self._new_core()
                for each in self._running:
                    each.cancelled = True
                    each.fail(InternalError("another call was interrupted in a tick that both shared"))
                self._running.clear()
                raise

    async def arun(self, job: Job) -> None:
        """Runs a job on another thread, while the event loop runs on; see `run`."""
        try:
            await asyncio.to_thread(self.run, job)
        except asyncio.CancelledError:
            job.cancelled = True
            raise

    def close(self) -> None:
        """Releases the model, after the jobs that run."""
        with self._lock:
            self._core = None

    def _new_core(self) -> EngineCore:
        return EngineCore([self._model], self._max_lanes, _TICK_STEPS, NoMetrics(), self._threads)
