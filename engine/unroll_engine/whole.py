"""Whole sequences: those of a model that looks at more than the past, and so can't be cut into ticks."""

import time
from collections import deque
from collections.abc import Iterable, Sequence

import numpy as np

from unroll_engine.jobs import BatchJob, Emit, Job, complete
from unroll_engine.models.loader import Model
from unroll_engine.models.spec import Float32Array
from unroll_engine.scheduler import Slice, TickCost, alert_steps


class WholeSequences:
    """The sequences of one model that run next, each in one piece; the counterpart of Lanes.

    Args:
        model: The model to run them on.
        max_steps: Timesteps of a tick, after which no further sequence begins.

    Attributes:
        count: Sequences that wait for their run.
        interactive: 0: no caller waits for steps.
        width: 1: they run one after the other.
    """

    interactive = 0
    width = 1

    def __init__(self, model: Model, max_steps: int) -> None:
        self.model = model
        self._max_steps = max_steps
        self._next: deque[tuple[BatchJob, int]] = deque()

    @property
    def count(self) -> int:
        """Sequences that wait for their run."""
        return len(self._next)

    @property
    def jobs(self) -> Iterable[Job]:
        """The job of each sequence; one with several is repeated."""
        return [job for job, _ in self._next]

    def join(self, slices: Sequence[Slice[Job]]) -> None:
        """Appends sequences."""
        for job, first, number in slices:
            assert isinstance(job, BatchJob)
            if first == 0:
                job.make_results()
            self._next.extend((job, index) for index in range(first, first + number))

    def drop_cancelled(self) -> None:
        """Drops the sequences of cancelled jobs."""
        self._next = deque(each for each in self._next if not each[0].cancelled)

    def clear(self) -> Iterable[Job]:
        """Drops every sequence and returns their jobs."""
        jobs = dict.fromkeys(self.jobs)
        self._next.clear()
        return jobs

    def plan(self, cost: TickCost, alert: bool) -> int:
        """Chooses the timesteps of the next tick: at least those of one sequence."""
        limit = min(self._max_steps, alert_steps(cost, self.width)) if alert else self._max_steps
        steps = 0
        for job, index in self._next:
            length = int(job.offsets[index + 1] - job.offsets[index])
            if steps and steps + length > limit:
                break
            steps += length
        return steps

    def run(self, steps: int, emit: Emit) -> tuple[int, float]:
        """Runs a planned tick.

        Returns:
            Computed timesteps, and the seconds of the model's runs.
        """
        begin, done = time.perf_counter(), 0
        ended: list[BatchJob] = []
        while done < steps:
            job, index = self._next.popleft()
            values = job.values[job.offsets[index] : job.offsets[index + 1]]
            done += len(values)
            job.logits[index] = self._run(values)
            if job.sequences_done(1):
                ended.append(job)
        seconds = time.perf_counter() - begin
        complete(ended)
        for job in ended:
            emit((job, job))
        return done, seconds

    def fits_single(self, job: Job) -> bool:
        """Returns True if a job is one sequence of at most a tick, for `run_single`; only if none waits."""
        return job.size == 1 and job.steps <= self._max_steps

    def run_single(self, job: Job, emit: Emit) -> None:
        """Runs a job of one sequence by itself."""
        assert isinstance(job, BatchJob)
        job.make_results()
        job.logits[0] = self._run(job.values)
        complete([job])
        emit((job, job))

    def _run(self, values: Float32Array) -> Float32Array:
        """Runs a sequence, [steps, input_size]; returns its outputs, [output_size]."""
        logits: Float32Array = self.model.runtime.run(values[:, np.newaxis], ()).logits[-1, 0]
        return logits
