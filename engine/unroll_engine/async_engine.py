"""The engine: takes work on the event loop, has it run, and hands the results back.

Ticks that are short run on the event loop itself, at once: handing a tick to a thread and back costs about as much as
a short one takes. What is longer runs on a thread, so the event loop never waits for a model. The core belongs to one
of the two at a time.
"""

import asyncio
import contextlib
import os
import queue
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

from unroll_engine.admission import Admission, LimitsOf
from unroll_engine.admission_controller import AdmissionController
from unroll_engine.core import EngineCore, deliver
from unroll_engine.errors import ModelNotFoundError
from unroll_engine.jobs import BatchJob, Job
from unroll_engine.models.loader import Model
from unroll_engine.observer import Metrics, NoMetrics


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


ONE_CORE = _cores() == 1
INLINE = 5e-3 if ONE_CORE else 250e-6
"""Seconds that a tick may take on the event loop. More where there is no second core: then a thread takes as much from
the event loop as the tick does, and both from each other."""
SLICE = 250e-6
"""Seconds of ticks in a row after which the event loop sees to others, where it runs them itself."""
TURNS = 16
"""Turns of the event loop without new work, at most, after which a tick runs on it."""


def _let_others() -> None:
    """Lets the threads that bring work run, where they share this one's core."""
    if ONE_CORE and hasattr(os, "sched_yield"):
        os.sched_yield()


class _Change(NamedTuple):
    """A model that comes or goes."""

    model: Model
    comes: bool


class AsyncEngine:
    """Runs work of several models. Its methods are called on one event loop.

    Args:
        models: What can be run.
        max_lanes: Sequences of one class, streams or bulk, in one tick, at most.
        tick_steps: Timesteps in a tick of all lanes, at most.
        max_queued_steps: Timesteps accepted and not yet answered, over all models; work beyond it is refused.
        max_queued_bytes: Bytes of values and states, likewise.
        metrics: Counts what is done.
        limits_of: What a caller may have queued, by its identity; None where callers have no limits.

    Attributes:
        admission: Bounds what may be queued.
    """

    def __init__(
        self,
        models: Sequence[Model],
        *,
        max_lanes: int,
        tick_steps: int,
        max_queued_steps: int,
        max_queued_bytes: int = sys.maxsize,
        metrics: Metrics | None = None,
        limits_of: LimitsOf | None = None,
    ) -> None:
        metrics = metrics or NoMetrics()
        admission = Admission(max_queued_steps, max_queued_bytes, max_lanes * tick_steps, limits_of)
        self.admission = AdmissionController(admission, metrics.queue)
        self._loop = asyncio.get_running_loop()
        self._core = EngineCore(models, max_lanes, tick_steps, metrics)
        # What takes work: those that were removed finish what they have.
        self._models = set(models)
        # Work that has come, or whose caller has left, and models, since the core's owner looked last.
        self._inbox: deque[Job | _Change] = deque()
        self._max_lanes = max_lanes
        self._planned = False
        # Entries of the inbox that the last turn of the loop has seen, turns that are left, entries of the last time.
        self._taken = 0
        self._turns = 0
        self._company = 1
        # Whether the core is the thread's. Set on the loop, cleared on the thread.
        self._threaded = False
        self._closed = False
        self._handover: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run_on_thread, name="engine", daemon=True)
        self._thread.start()

    def add_model(self, model: Model) -> None:
        """Takes work of a model from now on."""
        self._models.add(model)
        self._send(_Change(model, comes=True))

    def remove_model(self, model: Model) -> None:
        """Takes no more work of a model, and lets it go when what there is of it is done."""
        self._models.remove(model)
        self._send(_Change(model, comes=False))

    async def run(self, batch: BatchJob) -> None:
        """Runs every sequence of `batch`; its results are in it afterwards.

        Raises:
            OverloadedError: there is no room, or no time, for it.
            ExpiredError: the deadline passed before it ran.
            InternalError: the runtime failed.
        """
        done = self._loop.create_future()
        # The caller may have left before the batch ends.
        batch.on_end = lambda: None if done.done() else done.set_result(None)
        self.start(batch)
        try:
            await done
        finally:
            self.end(batch)
        if batch.error:
            raise batch.error

    def start(self, job: Job) -> None:
        """Queues work; `end` must be called when it is over or its caller leaves.

        Raises:
            OverloadedError: there is no room, or no time, for it, or its caller has had its share.
            ModelNotFoundError: its model was removed.
        """
        if job.model not in self._models:
            raise ModelNotFoundError(f"{job.model.spec.key} is not served any more", "model")
        self.admission.enter(job)
        if job.call is not None:
            job.call.steps += job.steps
        self._send(job)

    def end(self, job: Job) -> None:
        """Takes work off the books; what of it is not yet computed is dropped, and nothing more of it delivered."""
        self.admission.leave(job)
        if not job.over:
            job.cancelled = True
            self._send(job)

    def close(self) -> None:
        """Ends the engine's thread after its current tick. Work that is not yet done never will be."""
        self._closed = True
        self._handover.put(None)
        self._thread.join()

    def _send(self, entry: Job | _Change) -> None:
        self._inbox.append(entry)
        # The thread looks into the inbox once more after it has cleared its flag, so nothing is left lying.
        if not self._threaded:
            self._plan()

    def _plan(self) -> None:
        if not self._planned:
            self._planned = True
            self._loop.call_soon(self._run_on_loop)

    def _take_inbox(self) -> None:
        now = time.monotonic()
        while self._inbox:
            entry = self._inbox.popleft()
            if isinstance(entry, _Change):
                if entry.comes:
                    self._core.add_model(entry.model)
                else:
                    self._core.remove_model(entry.model)
            elif entry.arrived:
                self._core.cancel(entry)
            else:
                self._core.add(entry, now)

    def _run_on_loop(self) -> None:
        """Runs ticks for as long as they are short, then leaves the core to the thread."""
        # What is delivered while this runs may plan it again, before it leaves the core to the thread.
        if self._threaded or self._closed:
            self._planned = False
            return
        # A tick costs nearly the same for one as for many, and what comes next is often on its way through the loop:
        # as long as every few turns of it bring more, it is let go round. The more came the last time, the more turns.
        if self._taken < len(self._inbox):
            self._taken = len(self._inbox)
            self._turns = min(TURNS, 4 * self._company - 3)
        if self._turns and self._taken < self._max_lanes and not self._core.backlog:
            self._turns -= 1
            _let_others()
            self._loop.call_soon(self._run_on_loop)
            return
        self._company = self._taken or self._company
        self._taken = self._turns = 0
        self._planned = False
        begin = now = time.monotonic()
        until = begin + SLICE
        while True:
            self._take_inbox()
            seconds = self._core.prepare(now)
            if seconds is None:
                deliver(self._core.events())
                return
            if seconds > INLINE or (now > begin and now + seconds > until):
                break
            self._core.run()
            deliver(self._core.events())
            now = time.monotonic()
            if ONE_CORE and now > until:
                # Planned again in any case, and planning a tick is not done twice.
                self._plan()
                return
        if seconds <= INLINE and ONE_CORE:
            # The rest after the loop has seen to others: without a second core a thread would only be in its way.
            self._plan()
        else:
            self._threaded = True
            self._handover.put(None)

    def _run_on_thread(self) -> None:
        """Whenever the core is left to this thread, runs it until there is nothing to do."""
        while True:
            self._handover.get()
            idle = False
            while not idle and not self._closed:
                self._take_inbox()
                idle = self._core.prepare(time.monotonic()) is None
                if not idle:
                    self._core.run()
                if events := self._core.events():
                    self._call_soon(deliver, events)
            if self._closed:
                return
            self._threaded = False
            self._call_soon(self._resume)

    def _call_soon(self, *call: Any) -> None:
        # Once the loop is closed nobody is left to hear.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(*call)

    def _resume(self) -> None:
        """Takes up what came in while the thread was about to stop."""
        if self._inbox and not self._threaded:
            self._plan()
