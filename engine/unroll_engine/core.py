"""The engine's core: schedules, gathers, runs and scatters ticks. It has one owner at a time, and no threads.

A tick runs K timesteps of the sequences of one model that are in flight. Sequences join and leave between ticks, each
at its own length; there is no timer, what is ready runs. Compare cellular batching (Gao et al., "Low latency RNN
inference with cellular batching", EuroSys 2018) and iteration-level scheduling (Yu et al., "Orca", OSDI 2022).
"""

import logging
import time
from collections import deque
from collections.abc import Iterable

from unroll_engine.errors import ExpiredError, InternalError, RequestError
from unroll_engine.jobs import Job
from unroll_engine.lanes import Lanes
from unroll_engine.models.loader import Model
from unroll_engine.observer import Metrics, ObservedCall
from unroll_engine.scheduler import CALM, Queue, capacity_of, tick_steps
from unroll_engine.single_sequence import run_alone

_log = logging.getLogger(__name__)

FIRST_GUESS = 50e-6
"""Seconds that a tick takes beside the model's run, until some have been timed."""
LEARNING = 0.05
"""How much of that a single tick tells."""

Events = list[tuple[Job, object]]
"""What a tick has to say to works, in order; see Job.deliver, or a RequestError for Job.fail."""


def deliver(events: Events) -> None:
    """Passes events to their jobs, in order."""
    for job, event in events:
        if isinstance(event, RequestError):
            job.fail(event)
        elif not job.cancelled:
            job.deliver(event)


class ModelQueue:
    """One model's queue and lanes."""

    def __init__(self, model: Model, max_lanes: int, max_steps: int, events: Events, metrics: Metrics) -> None:
        self.model = model
        self.metrics = metrics.of(str(model.spec.key))
        self.queue: Queue[Job] = Queue(max_lanes, self._drop)
        self.lanes = Lanes(model, capacity_of(max_lanes), max_steps)
        self.last_interactive = float("-inf")
        self.cost = model.cost
        # Whether there may be calls among the lanes that want to hear of their ticks.
        self.traced = False
        self._own = 0.0
        self._events = events
        self.learn(FIRST_GUESS)

    def traced_calls(self, lone: Job | None) -> list[ObservedCall]:
        """The calls that want to hear of the next tick: of `lone`, or of the lanes."""
        jobs = (lone,) if lone else self.lanes.jobs
        calls = {job.call: None for job in jobs if job.call is not None and job.call.traced}
        self.traced = bool(calls or self.queue)
        return list(calls)

    def learn(self, own: float) -> None:
        """Takes in how many seconds a tick took beside the model's run."""
        # A tick that another process held up says nothing of the next one.
        self._own += LEARNING * (min(own, 4 * self._own) - self._own) if self._own else own
        fixed = self.model.cost.fixed + self._own
        # In coarse steps: what is weighed for a cost is kept.
        if not 0.8 * self.cost.fixed < fixed < 1.25 * self.cost.fixed:
            self.cost = self.model.cost._replace(fixed=fixed)

    def close(self) -> None:
        """Ends the room, which is idle."""
        # It and its queue refer to each other: without this, a model's memory would wait for a garbage collection.
        del self.queue

    def _drop(self, job: Job, cause: str) -> None:
        self.metrics.dropped(cause, job.size - job.taken)
        if not job.cancelled:
            job.cancelled = True
            if job.taken:
                self.lanes.drop_cancelled()
            self._events.append((job, ExpiredError("the deadline passed before it could be computed")))


class EngineCore:
    """Runs work of several models in turns.

    Args:
        models: What can be run.
        max_lanes: Sequences of one class, streams or bulk, in a tick of a model, at most.
        max_steps: Timesteps of a tick, at most, of all lanes or of streams; one of few lanes may run more.
        metrics: Counts what is done.
    """

    def __init__(self, models: Iterable[Model], max_lanes: int, max_steps: int, metrics: Metrics) -> None:
        self._max_lanes = max_lanes
        self._max_steps = max_steps
        self._metrics = metrics
        self._events: Events = []
        self._rooms: dict[Model, ModelQueue] = {}
        self._rotation: deque[ModelQueue] = deque()
        # Rooms that go when their last work is done.
        self._leaving: set[ModelQueue] = set()
        self._room: ModelQueue | None = None
        self._steps = 0
        self._preparing = 0.0
        # Work that the planned tick runs by itself, past the lanes.
        self._lone: Job | None = None
        for model in models:
            self.add_model(model)

    def add_model(self, model: Model) -> None:
        """Makes room for the work of a model."""
        room = ModelQueue(model, self._max_lanes, self._max_steps, self._events, self._metrics)
        room.metrics.serves(1)
        self._rooms[model] = room
        self._rotation.append(room)

    def remove_model(self, model: Model) -> None:
        """Gives the room of a model away when the work that it has is done; no more may come."""
        self._leaving.add(self._rooms[model])
        self._remove_idle()

    def _remove_idle(self) -> None:
        for room in list(self._leaving):
            lone = self._lone is not None and self._lone.model is room.model
            if not (room.queue or room.lanes.count or lone):
                room.metrics.serves(-1)
                self._leaving.remove(room)
                self._rotation.remove(room)
                del self._rooms[room.model]
                room.close()
                if self._room is room:
                    self._room = None

    @property
    def backlog(self) -> bool:
        """Whether work waits that was not let in: the lanes are full, and what comes now can't share the next tick."""
        return any(room.queue for room in self._rooms.values())

    def add(self, job: Job, now: float) -> None:
        """Queues work that came at time `now`."""
        room = self._rooms[job.model]
        room.queue.add(job, now)
        if job.interactive:
            room.last_interactive = now

    def cancel(self, job: Job) -> None:
        """Frees what work holds whose caller has left, and has marked it so."""
        room = self._rooms.get(job.model)
        if room is None:  # all was computed, though not yet delivered
            return
        if job.taken < job.size:
            room.queue.cancel()
        if job.taken:
            room.lanes.drop_cancelled()

    def prepare(self, now: float) -> float | None:
        """Plans the next tick: lets waiting work join the lanes of the next model in turn that has any.

        Returns:
            Seconds that the tick is expected to take; None where there is nothing to run.
        """
        if self._lone and self._room:
            if not self._lone.cancelled:
                return self._room.cost.seconds(1, self._steps)
            self._room.metrics.dropped("cancelled", 1)
        self._lone = None
        if self._leaving:
            # Not only where there is nothing to run: under load that may never be.
            self._remove_idle()
        begin = time.perf_counter()
        for _ in range(len(self._rotation)):
            room = self._rotation[0]
            self._rotation.rotate(-1)
            lanes = room.lanes
            if room.queue:
                slices = room.queue.take(now, lanes.interactive, lanes.count - lanes.interactive)
                for job, first, _ in slices:
                    if first == 0:
                        job.waited = max(now - job.arrived, 0.0)
                        room.metrics.waited(job.waited)
                        if job.call is not None and job.call.traced:
                            room.traced = True
                            job.call.waited(str(room.model.spec.key), now - job.arrived)
                if len(slices) == 1 and not lanes.count and self._is_short(slices[0].job, lanes):
                    self._room, self._lone, self._steps = room, slices[0].job, slices[0].job.steps
                    return room.cost.seconds(1, self._steps)
                if slices:
                    lanes.join(slices)
            if lanes.count:
                lanes.settle()
                self._room = room
                self._steps = tick_steps(
                    self._max_steps if lanes.interactive else lanes.longest_tick,
                    room.cost,
                    lanes.remaining,
                    interactive=lanes.shortest_interactive,
                    exact=lanes.shortest_exact,
                    alert=now - room.last_interactive < CALM,
                )
                self._preparing = time.perf_counter() - begin
                return room.cost.seconds(lanes.count, self._steps)
        if self._leaving:
            self._remove_idle()
        return None

    def run(self) -> None:
        """Runs the tick that was planned last."""
        room, steps, lone = self._room, self._steps, self._lone
        assert room is not None
        self._lone = None
        lanes, runtime = room.lanes, room.model.runtime
        count = 1 if lone else lanes.count
        traced = room.traced_calls(lone) if room.traced else []
        begin = time.perf_counter()
        try:
            if lone:
                real = steps
                run_alone(lone, runtime, self._emit)
            else:
                gathered = lanes.gather(steps)
                model_begins = time.perf_counter()
                result = runtime.run(*gathered)
                model_took = time.perf_counter() - model_begins
                real = lanes.scatter(steps, result, self._emit)
        except Exception:
            _log.exception("%s: a tick of %d lanes failed", room.model.spec.key, count)
            for job in [lone] if lone else lanes.clear():
                # What of it still waits is not run either.
                job.cancelled = True
                self._emit(job, InternalError("the model's runtime failed"))
            return
        took = time.perf_counter() - begin
        if not lone:
            room.learn(self._preparing + took - model_took)
        room.metrics.tick(count, steps, real, took)
        if traced:
            traced[0].ticked(traced[1:], str(room.model.spec.key), count, steps, real, took)

    def _is_short(self, job: Job, lanes: Lanes) -> bool:
        return job.size == 1 and job.steps <= (self._max_steps if job.interactive else lanes.longest_tick)

    def events(self) -> Events:
        """What is to be delivered since the last call; a new list."""
        events = self._events.copy()
        self._events.clear()
        return events

    def _emit(self, job: Job, event: object) -> None:
        self._events.append((job, event))
