"""AsyncEngine: runs jobs from an event loop.

Short ticks run on the event loop itself, since handing one to a thread and back costs about as much as a short tick.
Longer ones run on a thread, so that the event loop never waits for a model. The core belongs to one of the two at a
time.
"""

import asyncio
import contextlib
import os
import queue
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from unroll_engine.admission import AdmissionController, QuotaOf
from unroll_engine.core import EngineCore, deliver, usable_cores
from unroll_engine.errors import ModelNotFoundError
from unroll_engine.jobs import BatchJob, Job
from unroll_engine.models.loader import Model
from unroll_engine.observer import Metrics, NoMetrics
from unroll_engine.scheduler import CALM

ONE_CORE = usable_cores() == 1
INLINE = 5e-3 if ONE_CORE else 250e-6
"""Most seconds of a tick on the event loop. More on a single core, which a thread would have to share."""
LOOP_BUDGET = 250e-6
"""Seconds of consecutive ticks on the event loop after which other callbacks run."""
TURNS = 16
"""Most turns of the event loop without a new job before a tick runs."""
STREAM_TURNS = 3
"""Turns of the event loop after a tick on it, while streams are active: a step that has arrived becomes a job, or its
answer is sent, before the next bulk tick."""


class JobEnd(asyncio.Future[None]):
    """The end of a job, for which a coroutine waits with or without a task.

    Attributes:
        resume: Called when the job ends; set by whatever runs a coroutine without a task.
    """

    resume: Callable[[], None] | None = None

    def end(self, _: None) -> None:
        """Resumes the coroutine; see BatchJob.on_end."""
        self.set_result(None)
        if self.resume:
            self.resume()


class _ModelChange(NamedTuple):
    """A change of the models: one to add or to remove."""

    model: Model
    added: bool


class AsyncEngine:
    """Runs jobs of several models. Its methods are called on one event loop.

    Args:
        models: Models that can be run.
        max_lanes: Most sequences of one class, interactive or bulk, in one tick on one thread.
        tick_steps: Most timesteps of a tick of all lanes.
        max_queued_steps: Most timesteps admitted and not yet answered, over all models.
        max_queued_bytes: Most bytes of their values and states.
        threads: Threads that the step kernel computes on.
        metrics: Counts what is done.
        quota_of: Returns the most timesteps that an identity may have queued; None if no caller has a quota.

    Attributes:
        admission: Bounds what is queued.
        tick_steps: As given.
    """

    def __init__(
        self,
        models: Sequence[Model],
        *,
        max_lanes: int,
        tick_steps: int,
        max_queued_steps: int,
        max_queued_bytes: int = sys.maxsize,
        threads: int = 1,
        metrics: Metrics | None = None,
        quota_of: QuotaOf | None = None,
    ) -> None:
        metrics = metrics or NoMetrics()
        self.tick_steps = tick_steps
        full_tick = max_lanes * tick_steps
        self.admission = AdmissionController(max_queued_steps, max_queued_bytes, full_tick, quota_of, metrics.queue)
        self._loop = asyncio.get_running_loop()
        self._core = EngineCore(models, max_lanes, tick_steps, metrics, threads)
        # Models that accept jobs; the core keeps removed ones until their last job is done.
        self._models = set(models)
        # Jobs that arrived or were cancelled, and changes of models, for the core's owner.
        self._inbox: deque[Job | _ModelChange] = deque()
        self._max_lanes = max_lanes
        # True if `_run_on_loop` is scheduled.
        self._scheduled = False
        # Entries of the inbox at the last turn of the loop; turns left to wait; entries before the last tick.
        self._arrivals = 0
        self._turns = 0
        self._last_arrivals = 1
        # Turns left to wait for a step of a stream, if streams are active until then; True if one has arrived.
        self._stream_turns = 0
        self._streams_until = 0.0
        self._interactive = False
        # True if the core belongs to the thread. Set on the loop, cleared on the thread.
        self._threaded = False
        self._closed = False
        self._handover: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run_on_thread, name="engine", daemon=True)
        self._thread.start()

    def add_model(self, model: Model) -> None:
        """Accepts jobs of a model from now on."""
        self._models.add(model)
        self._send(_ModelChange(model, added=True))

    def remove_model(self, model: Model) -> None:
        """Accepts no more jobs of a model, and releases it after its last one."""
        self._models.remove(model)
        self._send(_ModelChange(model, added=False))

    async def run(self, batch: BatchJob) -> None:
        """Runs every sequence of `batch`, which then holds the results.

        Raises:
            OverloadedError: there is no room for it, or it can't be answered in time.
            ExpiredError: the deadline passed before it ran.
            InvalidRequestError: its values overflow in the model's arithmetic.
            InternalError: the runtime failed.
        """
        done = JobEnd(loop=self._loop)
        batch.on_end = done.end
        self.start(batch)
        try:
            await done
        finally:
            # The caller may leave before the batch ends.
            del batch.on_end
            self.end(batch)
        if batch.error:
            batch.raise_error()

    def start(self, job: Job) -> None:
        """Queues a job. `end` must be called when it is over or its caller leaves.

        Raises:
            OverloadedError: there is no room for it, it can't be answered in time, or its caller's quota is used up.
            ModelNotFoundError: its model was removed.
        """
        if job.model not in self._models:
            raise ModelNotFoundError(f"{job.model.spec.key} is no longer served", "model")
        self.admission.admit(job)
        self._interactive = self._interactive or job.interactive
        self._send(job)

    def end(self, job: Job) -> None:
        """Releases a job: drops the rest of its work and delivers no more results."""
        self.admission.release(job)
        if not job.over:
            job.cancelled = True
            self._send(job)

    def close(self) -> None:
        """Ends the engine's thread after its current tick. Jobs that are not over never end."""
        self._closed = True
        self._handover.put(None)
        self._thread.join()

    def _send(self, entry: Job | _ModelChange) -> None:
        self._inbox.append(entry)
        # The thread reads the inbox once more after it cleared its flag, so no entry is left in it.
        if not (self._threaded or self._scheduled):
            self._scheduled = True
            self._loop.call_soon(self._run_on_loop)

    def _schedule(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._run_on_loop)

    def _take_inbox(self) -> None:
        now = time.monotonic()
        while self._inbox:
            entry = self._inbox.popleft()
            if isinstance(entry, _ModelChange):
                if entry.added:
                    self._core.add_model(entry.model)
                else:
                    self._core.remove_model(entry.model)
            elif entry.arrived:
                self._core.cancel(entry)
            else:
                self._core.add(entry, now)

    def _run_on_loop(self) -> None:
        """Runs ticks while they are short, then hands the core to the thread."""
        # Delivering events may schedule this again, before the core is handed to the thread.
        if self._threaded or self._closed:
            self._scheduled = False
            return
        # A tick costs nearly the same for one sequence as for many, and more jobs are often on their way through the
        # loop: while new ones arrive within a few turns, the tick waits. The more came last time, the more turns.
        if self._arrivals < len(self._inbox):
            self._arrivals = len(self._inbox)
            self._turns = min(TURNS, 4 * self._last_arrivals - 3)
        if self._turns and self._arrivals < self._max_lanes and not self._core.backlog:
            self._turns -= 1
            if ONE_CORE and hasattr(os, "sched_yield"):
                # Yields to the threads that bring jobs.
                os.sched_yield()
            self._loop.call_soon(self._run_on_loop)
            return
        if self._stream_turns and not self._interactive:
            self._stream_turns -= 1
            self._loop.call_soon(self._run_on_loop)
            return
        self._last_arrivals = self._arrivals or self._last_arrivals
        self._arrivals = self._turns = self._stream_turns = 0
        self._scheduled = False
        begin = now = time.monotonic()
        until = begin + LOOP_BUDGET
        if self._interactive:
            self._interactive = False
            self._streams_until = begin + CALM
        while True:
            seconds = None
            if len(self._inbox) == 1:
                entry = self._inbox[0]
                if not isinstance(entry, _ModelChange) and not entry.arrived:
                    seconds = self._core.plan_single(entry, now)
            if seconds is not None:
                self._inbox.clear()
            else:
                if self._inbox:
                    self._take_inbox()
                seconds = self._core.prepare(now)
            if seconds is None:
                deliver(self._core.events())
                return
            if seconds > INLINE or (now > begin and now + seconds > until):
                break
            self._core.run()
            deliver(self._core.events())
            if self._core.idle and not self._inbox:
                return
            now = time.monotonic()
            streams = now < self._streams_until
            if ONE_CORE and (streams or now > until):
                # Even so: a planned tick is not planned again.
                self._stream_turns = STREAM_TURNS if streams else 0
                self._schedule()
                return
        if seconds <= INLINE and ONE_CORE:
            # After the loop's other callbacks: on a single core a thread would only compete with them.
            self._schedule()
        else:
            self._threaded = True
            self._handover.put(None)

    def _run_on_thread(self) -> None:
        """Runs the core until it is idle whenever it is handed over."""
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
        # A closed loop has no callers left.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(*call)

    def _resume(self) -> None:
        """Runs what arrived while the thread was about to stop."""
        if self._inbox and not self._threaded:
            self._schedule()
