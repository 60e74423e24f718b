"""Lanes: the sequences of one model in flight, one per lane, in a dense prefix of preallocated arrays.

Lane i of a tick is column i of the arrays. One vectorized operation reads the last steps of all lanes that ended from
the result of a tick.
"""

import time
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from unroll_engine.jobs import BatchJob, ChunkJob, Emit, Job, Progress, StepsJob, complete
from unroll_engine.models.loader import Model
from unroll_engine.models.spec import Float32Array, State
from unroll_engine.runtimes.base import TickResult, Values
from unroll_engine.runtimes.lane_arrays import lane_state
from unroll_engine.scheduler import Slice, TickCost, tick_steps

_FEW_LANES_STEPS = 128
"""Most timesteps of a tick of few lanes, and of all on a device, where each tick costs much by itself."""
_DEVICE_INPUT = 2**24
"""Most values of a tick's input on a device, if ticks are longer there."""

# Rows of the table of lanes: the sequence's index in its job; steps left to run; the row of the job's values that the
# next step is in; 1 if the job is interactive; 1 if a tick must end where the lane does.
_INDEX, _LEFT, _ROW, _INTERACTIVE, _EXACT = range(5)


class Lanes:
    """The lanes of one model.

    Args:
        model: The model to run them on.
        capacity: Most lanes in use.
        max_steps: Most timesteps of a tick of all lanes.

    Attributes:
        count: Lanes in use.
        interactive: Lanes of interactive jobs.
    """

    def __init__(self, model: Model, capacity: int, max_steps: int) -> None:
        self.model = model
        self.count = 0
        self.interactive = 0
        self._exact = 0
        self._max_steps = max_steps
        self._most_steps = max(_FEW_LANES_STEPS, max_steps)
        rows = max_steps * capacity
        if model.runtime.device != "cpu":
            rows = max(rows, min(self._most_steps * capacity, _DEVICE_INPUT // model.spec.input_size))
        self._initial = model.spec.initial_state(1)
        self._state = lane_state(model.runtime, self._initial, capacity, rows, model.spec.input_size)
        self._table = np.zeros((5, capacity), np.int64)
        self._jobs: list[Job | None] = []  # by column; None for a lane that left
        self._holes: list[int] = []

    @property
    def width(self) -> int:
        """Lanes that one thread computes."""
        return self.count

    @property
    def jobs(self) -> Iterable[Job]:
        """The job of each lane in use; one with several lanes is repeated."""
        return filter(None, self._jobs)

    def join(self, slices: Sequence[Slice[Job]]) -> None:
        """Puts sequences into free lanes."""
        count = sum(number for _, _, number in slices)
        holes = self._holes[-count:]
        del self._holes[-count:]
        end = len(self._jobs) + count - len(holes)
        columns = [*holes, *range(len(self._jobs), end)]
        self._jobs += [None] * (end - len(self._jobs))
        self.count += count
        chosen = np.array(columns)
        begun: list[int] = []
        begun_with: list[State] = []
        begin = 0
        for job, first, number in slices:
            own = chosen[begin : begin + number]
            begin += number
            offsets = job.offsets[first : first + number + 1]
            self._table[_INDEX, own] = np.arange(first, first + number)
            self._table[_LEFT, own] = offsets[1:] - offsets[:-1]
            self._table[_ROW, own] = offsets[:-1]
            for column in columns[begin - number : begin]:
                self._jobs[column] = job
            if isinstance(job, BatchJob) and first == 0:
                job.make_results()
            if job.interactive:
                self._table[_INTERACTIVE, own] = 1
                self.interactive += number
            if job.keeps_states and not self.model.states_are_state:
                self._table[_EXACT, own] = 1
                self._exact += number
            if job.initial_state:
                begun += columns[begin - number : begin]
                begun_with.append(tuple(array[:, first : first + number] for array in job.initial_state))
        if len(begun) < count:
            self._state.put(chosen if holes else slice(end - count, end), None)
        if begun:
            self._state.put(begun, tuple(np.concatenate(given, axis=1) for given in zip(*begun_with, strict=True)))

    def drop_cancelled(self) -> None:
        """Frees the lanes of cancelled jobs."""
        self._free([column for column, job in enumerate(self._jobs) if job and job.cancelled])

    def clear(self) -> Iterable[Job]:
        """Frees every lane and returns the jobs that had one."""
        jobs = {job: None for job in self._jobs if job}
        self._jobs.clear()
        self._holes.clear()
        self._table[_INTERACTIVE:] = 0
        self.count = self.interactive = self._exact = 0
        return jobs

    def plan(self, cost: TickCost, alert: bool) -> int:
        """Chooses the timesteps of the next tick; see scheduler.tick_steps."""
        self._settle()
        # Few lanes may run more timesteps than all, in no more time.
        return tick_steps(
            self._max_steps if self.interactive else min(self._most_steps, len(self._state.inputs) // self.count),
            cost,
            self._table[_LEFT, : self.count],
            interactive=self._shortest(_INTERACTIVE) if self.interactive else None,
            exact=self._shortest(_EXACT) if self._exact else None,
            alert=alert,
        )

    def run(self, steps: int, emit: Emit) -> tuple[int, float]:
        """Runs a planned tick.

        Returns:
            Computed timesteps that belonged to sequences, and the seconds of the model's run.
        """
        x = self._gather(steps)
        begin = time.perf_counter()
        result = self._state.run(x)
        if self.interactive:  # most values are read, lane by lane
            result = TickResult(np.asarray(result.logits), np.asarray(result.states), result.final_state)
        seconds = time.perf_counter() - begin
        return self._scatter(steps, result, emit), seconds

    def fits_single(self, job: Job) -> bool:
        """Returns True if a job is one sequence of at most a tick, for `run_single`; only without lanes in use."""
        return job.size == 1 and job.steps <= (self._max_steps if job.interactive else self._most_steps)

    def run_single(self, job: Job, emit: Emit) -> None:
        """Runs a job of one sequence by itself, without a lane."""
        logits, states, final = self.model.runtime.run(job.values[:, np.newaxis], job.initial_state or self._initial)
        if isinstance(job, ChunkJob):
            emit((job, Progress(logits[:, 0], states[:, 0], tuple(array[:, 0] for array in final))))
            return
        job.final_state = tuple(map(np.asarray, final)) if job.keeps_states else None
        if isinstance(job, StepsJob):
            job.logits, job.states = logits[:, 0], states[:, 0]
        else:
            job.logits = logits[-1]
            complete([job])
        emit((job, job))

    def _shortest(self, kind: int) -> int:
        """Returns the fewest steps left to a lane that is _INTERACTIVE or _EXACT; there must be one."""
        left, is_kind = self._table[[_LEFT, kind], : self.count]
        return int(left[is_kind != 0].min())

    def _settle(self) -> None:
        """Moves the last lanes into the places of freed ones, so that the lanes in use are a dense prefix again."""
        if not self._holes:
            return
        movers = [column for column in range(self.count, len(self._jobs)) if self._jobs[column]]
        holes = [column for column in self._holes if column < self.count]
        for hole, column in zip(holes, movers, strict=True):
            self._jobs[hole] = self._jobs[column]
        del self._jobs[self.count :]
        self._holes.clear()
        if holes:
            self._table[:, holes] = self._table[:, movers]
            self._table[_INTERACTIVE:, movers] = 0
            self._state.move(movers, holes)

    def _gather(self, steps: int) -> Float32Array:
        """Returns the input of a tick, [steps, lanes, features]; only after `_settle`.

        Past a lane's end the input holds any values: by causality, no reported result depends on them.
        """
        count = self.count
        x = self._state.inputs[: steps * count].reshape(steps, count, -1)
        only = self._jobs[0]
        if only and self._jobs.count(only) == count > 1:
            rows = self._table[_ROW, :count] + np.arange(steps)[:, np.newaxis]
            only.values.take(rows, axis=0, out=x, mode="clip")
            return x
        rows, left = self._table[_ROW, :count].tolist(), self._table[_LEFT, :count].tolist()
        for column, (job, row, most) in enumerate(zip(self._jobs, rows, left, strict=True)):
            assert job is not None
            number = min(steps, most)
            x[:number, column] = job.values[row : row + number]
        return x

    def _scatter(self, steps: int, result: TickResult[Values], emit: Emit) -> int:
        """Reports the result of a tick, advances every lane, and frees those at their end.

        Returns:
            Computed timesteps that belonged to sequences.
        """
        count = self.count
        if self.interactive:
            self._report(steps, result, emit)
        left = self._table[_LEFT, :count]
        left -= steps
        self._table[_ROW, :count] += steps
        ended = np.flatnonzero(left <= 0)
        if len(ended) < count or self._exact:
            self._state.keep(result.final_state)
        if not len(ended):
            return count * steps
        over = left[ended]
        self._end(ended, steps - 1 + over, result, emit)
        return count * steps + int(over.sum())

    def _report(self, steps: int, result: TickResult[Values], emit: Emit) -> None:
        """Reports the steps of interactive jobs, except chunks that end with them: `_end` does."""
        columns = np.flatnonzero(self._table[_INTERACTIVE, : self.count])
        together: dict[StepsJob, list[int]] = {}
        for column, left in zip(columns.tolist(), self._table[_LEFT, columns].tolist(), strict=True):
            job = self._jobs[column]
            if isinstance(job, StepsJob):
                together.setdefault(job, []).append(column)
            elif isinstance(job, ChunkJob) and left > steps:
                emit((job, Progress(result.logits[:, column], result.states[:, column], None)))
        for several, own in together.items():
            index, left = self._table[[_INDEX, _LEFT]][:, own]
            row = several.offsets[index + 1] - left
            for step in range(steps):
                # The tick ends with the first interactive lane that does, so all of them run every step.
                several.logits[row + step] = result.logits[step, own]
                several.states[row + step] = result.states[step, own]

    def _end(self, ended: NDArray[np.int64], last: NDArray[np.int64], result: TickResult[Values], emit: Emit) -> None:
        """Passes the last steps of ended lanes, at rows `last` of the result, to their jobs, and frees the lanes."""
        columns = ended.tolist()
        groups = self._grouped(columns)
        kept: State | None = None
        if any(job.keeps_states for job in groups):
            # The tick ended with every lane whose state is wanted; those of other lanes are not read.
            is_state = self.model.states_are_state
            kept = (result.states[last, ended][np.newaxis],) if is_state else self._state.take(ended)
        logits = result.logits[last, ended]
        indices = self._table[_INDEX, ended]
        answered: list[BatchJob] = []
        for job, places in groups.items():
            if isinstance(job, ChunkJob):
                (place,) = places
                rows, column = slice(last[place] + 1), columns[place]
                # The state is copied: a view would keep that of all lanes in memory.
                final = tuple(array[:, place].copy() for array in kept or ())
                emit((job, Progress(result.logits[rows, column], result.states[rows, column], final)))
                continue
            if not isinstance(job, StepsJob):  # of those, every step is written already
                job.logits[indices[places]] = logits[places]
            for to, array in zip(job.final_state or (), kept or (), strict=job.keeps_states):
                to[:, indices[places]] = array[:, places]
            if job.sequences_done(len(places)):
                answered.append(job)
        complete([batch for batch in answered if not batch.interactive])
        for batch in answered:
            emit((batch, batch))
        self._free(columns)

    def _grouped(self, columns: Sequence[int]) -> Mapping[Job, Sequence[int] | NDArray[np.int64]]:
        """Returns the jobs of columns, each with the places of its own among them."""
        jobs = [self._jobs[column] for column in columns]
        groups: dict[Job, list[int]] = {}
        if jobs[0] and jobs.count(jobs[0]) == len(jobs):
            return {jobs[0]: np.arange(len(jobs))}
        for place, job in enumerate(jobs):
            assert job is not None
            groups.setdefault(job, []).append(place)
        return groups

    def _free(self, columns: list[int]) -> None:
        if len(columns) == self.count:
            self._jobs.clear()
            self._holes.clear()
        else:
            for column in columns:
                self._jobs[column] = None
            self._holes += columns
        self.count -= len(columns)
        if self.interactive or self._exact:
            special = self._table[_INTERACTIVE:, columns]
            self._table[_INTERACTIVE:, columns] = 0
            self.interactive -= int(special[0].sum())
            self._exact -= int(special[1].sum())
