"""The engine: takes work on the event loop, runs it in ticks on a thread of its own, hands the results back.

A tick runs K timesteps of up to `max_lanes` sequences of one model. Sequences join and leave between ticks, each at
its own length; there is no timer, what is ready runs. Compare cellular batching (Gao et al., "Low latency RNN
inference with cellular batching", EuroSys 2018) and iteration-level scheduling (Yu et al., "Orca", OSDI 2022).
"""

import asyncio
import logging
import queue
import threading
from collections import deque
from collections.abc import Sequence

from unroll_server.errors import InternalError, OverloadedError, RequestError
from unroll_server.lanes import Lanes
from unroll_server.models import Model
from unroll_server.scheduler import Queue, tick_steps
from unroll_server.work import Batch, Stretch, Work

_log = logging.getLogger(__name__)


class Engine:
    """Runs work of several models. Its methods are called on one event loop.

    Args:
        models: What can be run.
        max_lanes: Sequences in one tick, at most.
        tick_steps: Timesteps in one tick, at most.
        max_queued_steps: Timesteps accepted and not yet answered, over all models; work beyond it is refused.
    """

    def __init__(self, models: Sequence[Model], *, max_lanes: int, tick_steps: int, max_queued_steps: int) -> None:
        self._max_steps = tick_steps
        self._max_queued_steps = max_queued_steps
        self._queued_steps = 0
        self._loop = asyncio.get_running_loop()
        self._inbox: queue.SimpleQueue[Work | None] = queue.SimpleQueue()
        # From here on, of the engine's thread alone.
        self._lanes = {model: Lanes(model, max_lanes, tick_steps) for model in models}
        self._waiting: dict[Model, Queue[Work]] = {model: Queue() for model in models}
        self._rotation = deque(models)
        self._events: list[tuple[Work, object]] = []
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    async def classify(self, batch: Batch) -> None:
        """Runs every sequence of `batch`; its results are in it afterwards.

        Raises:
            OverloadedError: the queue is full.
            InternalError: the runtime failed.
        """
        with _Admitted(self, batch):
            await batch.wait()

    def stream(self, stretch: Stretch) -> "_Admitted":
        """Runs `stretch` for as long as the returned context is open; its progress is read from it meanwhile.

        Raises:
            OverloadedError: the queue is full, on entering the context.
        """
        return _Admitted(self, stretch)

    def close(self) -> None:
        """Ends the engine's thread after its current tick. Work that is not yet done never will be."""
        self._inbox.put(None)
        self._thread.join()

    def _submit(self, work: Work) -> None:
        if self._queued_steps and self._queued_steps + work.steps > self._max_queued_steps:
            raise OverloadedError(f"{self._queued_steps} timesteps are queued, {self._max_queued_steps} at most", 1.0)
        self._queued_steps += work.steps
        self._inbox.put(work)

    def _end(self, work: Work) -> None:
        # The thread looks at this flag before each tick; work that is done has left it already.
        work.cancelled = True
        self._queued_steps -= work.steps

    def _run(self) -> None:
        while self._take_inbox():
            for _ in range(len(self._rotation)):
                model = self._rotation[0]
                self._rotation.rotate(-1)
                if self._tick(model):
                    break

    def _take_inbox(self) -> bool:
        """Queues the work that has come in, waiting for some where there is nothing to do; False at the end."""
        busy = any(lanes.lanes for lanes in self._lanes.values()) or any(self._waiting.values())
        try:
            while True:
                work = self._inbox.get(block=not busy)
                if work is None:
                    return False
                self._waiting[work.model].add(work)
                busy = True
        except queue.Empty:
            return True

    def _tick(self, model: Model) -> bool:
        """Runs the next tick of a model; False where it had nothing to run."""
        lanes = self._lanes[model]
        lanes.drop_cancelled()
        for work, index in self._waiting[model].take(lanes.free):
            lanes.join(work, index)
        if not lanes.lanes:
            return False
        remaining = [lane.end - lane.position for lane in lanes.lanes]
        exact = [
            steps
            for lane, steps in zip(lanes.lanes, remaining, strict=True)
            if lane.work.keeps_states and not model.states_are_state
        ]
        steps = tick_steps(self._max_steps, remaining, exact)
        try:
            lanes.scatter(steps, model.runtime.run(*lanes.gather(steps)), self._emit)
        except Exception:
            _log.exception("%s: a tick of %d lanes failed", model.spec.key, len(lanes.lanes))
            for work in lanes.clear():
                self._emit(work, InternalError("the model's runtime failed"))
        if self._events:
            self._loop.call_soon_threadsafe(self._deliver, self._events)
            self._events = []
        return True

    def _emit(self, work: Work, event: object) -> None:
        self._events.append((work, event))

    @staticmethod
    def _deliver(events: list[tuple[Work, object]]) -> None:
        for work, event in events:
            if isinstance(event, RequestError):
                work.cancelled = True
                work.fail(event)
            else:
                work.deliver(event)


class _Admitted:
    """Work in the engine's care: counted against the queue's limit, and dropped when the caller leaves the block."""

    def __init__(self, engine: Engine, work: Work) -> None:
        self._engine = engine
        self._work = work

    def __enter__(self) -> None:
        self._engine._submit(self._work)

    def __exit__(self, *exc_info: object) -> None:
        self._engine._end(self._work)
