"""EngineCore: plans and runs ticks. It has one owner at a time and no threads.

A tick runs K timesteps of the sequences of one model that are in flight. Sequences join and leave between ticks, each
at its own length. There is no timer: ready work runs at once. Compare cellular batching (Gao et al., "Low latency RNN
inference with cellular batching", EuroSys 2018) and iteration-level scheduling (Yu et al., "Orca", OSDI 2022).
"""

import logging
import os
import time
from collections import deque
from collections.abc import Iterable

from unroll_engine.errors import ExpiredError, InternalError, RequestError
from unroll_engine.jobs import Job
from unroll_engine.lanes import Lanes
from unroll_engine.models.loader import Model
from unroll_engine.observer import Metrics, Trace
from unroll_engine.runtimes.kernel import KernelRuntime
from unroll_engine.scheduler import CALM, Queue, capacity_of
from unroll_engine.slots import Slots
from unroll_engine.whole import WholeSequences

_log = logging.getLogger(__name__)

INITIAL_OVERHEAD = 50e-6
"""Seconds of a tick besides the model's run, until ticks have been timed."""
OVERHEAD_WEIGHT = 0.05
"""Weight of one tick in that estimate."""

Events = list[tuple[Job, object]]
"""Results for jobs, in order: an event for Job.deliver, or a RequestError for Job.fail."""


def usable_cores() -> int:
    """Returns the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def deliver(events: Events) -> None:
    """Passes events to their jobs, in order."""
    for job, event in events:
        if isinstance(event, RequestError):
            job.fail(event)
        elif not job.cancelled:
            job.deliver(event)


class ModelQueue:
    """The jobs of one model: those that wait, and the lanes of those that run.

    Attributes:
        cost: Cost of a tick, measured at load and updated since.
        last_interactive: Time on the core's clock at which the last interactive job left the queue.
        traced: True if jobs of traced calls may be in the lanes.
    """

    def __init__(
        self, model: Model, max_lanes: int, max_steps: int, threads: int, events: Events, metrics: Metrics
    ) -> None:
        self.model = model
        self.metrics = metrics.of(str(model.spec.key))
        self.lanes: Lanes | Slots | WholeSequences
        if isinstance(model.runtime, KernelRuntime):
            self.lanes = Slots(model, model.runtime.network, capacity_of(max_lanes), max_steps, threads)
            max_lanes *= threads
        elif model.spec.whole:
            self.lanes = WholeSequences(model, max_steps)
        else:
            self.lanes = Lanes(model, capacity_of(max_lanes), max_steps)
        self.queue: Queue[Job] = Queue(max_lanes, self._drop)
        self.last_interactive = float("-inf")
        self.cost = model.cost
        self.traced = False
        self._overhead = 0.0
        self._events = events
        self.learn(INITIAL_OVERHEAD)

    def traces(self, single: Job | None) -> list[Trace]:
        """Returns the traces of the next tick's calls: that of `single`, or those of the lanes."""
        jobs = (single,) if single else self.lanes.jobs
        traces = {job.trace: None for job in jobs if job.trace is not None}
        self.traced = bool(traces or self.queue.waiting)
        return list(traces)

    def record_start(self, job: Job, now: float) -> None:
        """Reports that the first sequences of a job leave the queue."""
        if job.interactive:
            self.last_interactive = now
        job.waited += max(now - job.arrived, 0.0)
        self.metrics.waited(job.waited, job.trace)
        if job.trace is not None:
            self.traced = True
            job.trace.waited(str(self.model.spec.key), job.waited)

    def learn(self, overhead: float) -> None:
        """Updates the cost of a tick by the seconds that one took besides the model's run."""
        # Bounded: a tick that another process held up does not predict the next one.
        usual = self._overhead or overhead
        self._overhead = usual + OVERHEAD_WEIGHT * (min(overhead, 4 * usual) - usual)
        fixed = self.model.cost.fixed + self._overhead
        # In coarse steps: the scheduler caches by cost.
        if not 0.8 * self.cost.fixed < fixed < 1.25 * self.cost.fixed:
            self.cost = self.model.cost._replace(fixed=fixed)

    def close(self) -> None:
        """Ends the queue, which is idle."""
        # Breaks the cycle with `_drop`, which would keep the model in memory until a garbage collection.
        del self.queue

    def _drop(self, job: Job, cause: str) -> None:
        self.metrics.dropped(cause, job.size - job.taken)
        if not job.cancelled:
            job.cancelled = True
            if job.taken:
                self.lanes.drop_cancelled()
            self._events.append((job, ExpiredError("the deadline passed before it could be computed")))


class EngineCore:
    """Runs jobs of several models in turns.

    Args:
        models: Models that can be run.
        max_lanes: Most sequences of one class, interactive or bulk, in a tick of a model; times `threads` if the
            kernel runs it.
        max_steps: Most timesteps of a tick of all lanes or of interactive ones; a tick of few lanes may run more.
        metrics: Counts what is done.
        threads: Threads that the kernel computes on.

    Attributes:
        backlog: True if jobs wait for lanes: then a job that arrives now can't join the next tick.
        idle: True if there is nothing to run.
    """

    def __init__(
        self, models: Iterable[Model], max_lanes: int, max_steps: int, metrics: Metrics, threads: int = 1
    ) -> None:
        self._max_lanes = max_lanes
        self._max_steps = max_steps
        self._threads = threads
        self._metrics = metrics
        self.backlog = False
        self.idle = True
        self._events: Events = []
        self._emit = self._events.append
        self._queues: dict[Model, ModelQueue] = {}
        self._rotation: deque[ModelQueue] = deque()
        # Queues to remove after their last job.
        self._retiring: set[ModelQueue] = set()
        # The planned tick: its queue, its timesteps, and the job that it runs past the lanes, if any.
        self._planned: ModelQueue | None = None
        self._steps = 0
        self._single: Job | None = None
        self._preparing = 0.0
        for model in models:
            self.add_model(model)

    def add_model(self, model: Model) -> None:
        """Accepts jobs of a model."""
        queue = ModelQueue(model, self._max_lanes, self._max_steps, self._threads, self._events, self._metrics)
        queue.metrics.serves(1)
        self._queues[model] = queue
        self._rotation.append(queue)

    def remove_model(self, model: Model) -> None:
        """Releases a model after its last job; no more may be added."""
        self._retiring.add(self._queues[model])
        self._remove_idle()

    def _remove_idle(self) -> None:
        for each in list(self._retiring):
            planned = self._single is not None and self._single.model is each.model
            if not (each.queue.waiting or each.lanes.count or planned):
                each.metrics.serves(-1)
                self._retiring.remove(each)
                self._rotation.remove(each)
                del self._queues[each.model]
                each.close()
                if self._planned is each:
                    self._planned = None

    def add(self, job: Job, now: float) -> None:
        """Queues a job that arrived at time `now`."""
        self._queues[job.model].queue.add(job, now)
        self.idle = False

    def cancel(self, job: Job) -> None:
        """Frees the lanes and the queue of a job that is marked as cancelled."""
        each = self._queues.get(job.model)
        if each is None:  # computed, though not yet delivered
            return
        if job.taken < job.size:
            each.queue.cancel()
        if job.taken:
            each.lanes.drop_cancelled()

    def prepare(self, now: float) -> float | None:
        """Plans the next tick: lets queued jobs join the lanes of the next model in turn that has any.

        Returns:
            Seconds that the tick is expected to take; None if there is nothing to run.
        """
        if self._single and self._planned:
            if not self._single.cancelled:
                return self._planned.cost.seconds(1, self._steps)
            self._planned.metrics.dropped("cancelled", 1)
        self._single = None
        if self._retiring:
            # Before each tick: under load there may always be something to run.
            self._remove_idle()
        begin = time.perf_counter()
        for _ in range(len(self._rotation)):
            each = self._rotation[0]
            self._rotation.rotate(-1)
            seconds = self._plan(each, now)
            if seconds is not None:
                self._preparing = time.perf_counter() - begin
                return seconds
        if self._retiring:
            self._remove_idle()
        self.idle = not self._retiring
        return None

    def plan_single(self, job: Job, now: float) -> float | None:
        """Plans a tick of a job that arrived at time `now`, past the queue and the lanes.

        Returns:
            Seconds that the tick is expected to take; None if the job must be added, since others run or it is not
            one short sequence.
        """
        each = self._queues[job.model]
        if not self.idle or job.deadline <= now or not each.lanes.fits_single(job):
            return None
        self.idle = False
        job.arrived = now
        job.taken = 1
        each.record_start(job, now)
        return self._plan_alone(each, job)

    def _plan_alone(self, each: ModelQueue, job: Job) -> float:
        self._planned, self._single, self._steps = each, job, job.steps
        return each.cost.seconds(1, job.steps)

    def _plan(self, each: ModelQueue, now: float) -> float | None:
        """Plans a tick of one model; see `prepare`."""
        lanes = each.lanes
        if each.queue.waiting:
            slices = each.queue.take(now, lanes.interactive, lanes.count - lanes.interactive)
            for job, first, _ in slices:
                if first == 0:
                    each.record_start(job, now)
            if len(slices) == 1 and not lanes.count and lanes.fits_single(slices[0].job):
                return self._plan_alone(each, slices[0].job)
            if slices:
                lanes.join(slices)
        if not lanes.count:
            return None
        self._planned = each
        self._steps = lanes.plan(each.cost, alert=now - each.last_interactive < CALM)
        return each.cost.seconds(lanes.width, self._steps)

    def run(self) -> None:
        """Runs the planned tick."""
        planned, steps, single = self._planned, self._steps, self._single
        assert planned is not None
        self._single = None
        lanes = planned.lanes
        count = 1 if single else lanes.count
        traces = planned.traces(single) if planned.traced else []
        begin = time.perf_counter()
        try:
            if single:
                real, model_took = steps, 0.0
                lanes.run_single(single, self._emit)
            else:
                real, model_took = lanes.run(steps, self._emit)
        except Exception:
            _log.exception("%s: a tick of %d lanes failed", planned.model.spec.key, count)
            for job in [single] if single else lanes.clear():
                # Its sequences that still wait are not run either.
                job.cancelled = True
                self._emit((job, InternalError("the model's runtime failed")))
            return
        finally:
            self.backlog = any(each.queue.waiting for each in self._rotation)
            self.idle = not (self.backlog or self._retiring or any(each.lanes.count for each in self._rotation))
        took = time.perf_counter() - begin
        if not single:
            planned.learn(self._preparing + took - model_took)
        planned.metrics.tick(count, steps, real, took, traces[0] if traces else None)
        if traces:
            traces[0].ticked(traces[1:], str(planned.model.spec.key), count, steps, real, took)

    def events(self) -> Events:
        """Returns the events since the last call, as a new list."""
        events = self._events.copy()
        self._events.clear()
        return events
