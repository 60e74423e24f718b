"""Lanes: the sequences of one model in flight, one per lane, in a dense prefix of preallocated arrays.

Lane i of a tick is column i of the arrays. A lane's next values lie in a region of its own; one vectorized operation
gathers a tick's input from the regions, and one reads the last steps of all lanes that ended from its result.
"""

import itertools
import math
import time
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from unroll_engine.jobs import BatchJob, ChunkJob, Emit, Job, StepsJob, complete
from unroll_engine.models.loader import Model
from unroll_engine.models.spec import Float32Array, State
from unroll_engine.runtimes.base import TickResult
from unroll_engine.scheduler import Slice, TickCost, tick_steps

_ALIGNMENT = 64
_REGION_STEPS = 128
"""Timesteps of a lane's region: most sequences fit, a longer one is copied into it piece by piece."""

# Rows of the table of lanes: the sequence's index in its job; steps left to run; the row of the regions that the next
# step is in; the first row of the lane's region; 1 if the job is interactive; 1 if a tick must end where the lane
# does.
_INDEX, _LEFT, _ROW, _REGION, _INTERACTIVE, _EXACT = range(6)

_FIRST = np.zeros(1, np.int64)


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
        self._long = 0
        features = model.spec.input_size
        self._max_steps = max_steps
        self._region = max(_REGION_STEPS, max_steps)
        self._regions = _aligned((capacity * self._region, features))
        self._input = _aligned((max_steps * capacity, features))
        self._steps = np.arange(self._region)[:, np.newaxis]
        self._initial = model.spec.initial_state(1)
        self._state = tuple(_aligned((each.shape[0], capacity, each.shape[2]), each.dtype) for each in self._initial)
        self._table = np.zeros((6, capacity), np.int64)
        self._table[_REGION] = np.arange(capacity) * self._region
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
        columns = [self._holes.pop() for _ in range(min(count, len(self._holes)))]
        columns += range(len(self._jobs), len(self._jobs) + count - len(columns))
        self._jobs += [None] * (columns[-1] + 1 - len(self._jobs))
        self.count += count
        chosen = np.array(columns)
        rows = self._table[_REGION, chosen].tolist()
        lengths: list[int] = []
        indices: list[int] = []
        interactive: list[int] = []
        exact: list[int] = []
        begun: list[int] = []
        begun_with: list[State] = []
        begin = 0
        for job, first, number in slices:
            end = begin + number
            own = columns[begin:end]
            lengths += self._copy_in(job, first, number, rows[begin:end])
            indices += range(first, first + number)
            for column in own:
                self._jobs[column] = job
            if isinstance(job, StepsJob) and first == 0:
                job.make_results()
            if job.interactive:
                interactive += own
            if job.keeps_states and not self.model.states_are_state:
                exact += own
            if job.initial_state:
                begun += own
                begun_with.append(tuple(array[:, first : first + number] for array in job.initial_state))
            begin = end
        self._table[_INDEX, chosen] = indices
        self._table[_LEFT, chosen] = lengths
        self._table[_ROW, chosen] = rows
        for kind, lanes in ((_INTERACTIVE, interactive), (_EXACT, exact)):
            if lanes:
                self._table[kind, lanes] = 1
        self.interactive += len(interactive)
        self._exact += len(exact)
        if len(begun) < count:
            for array, initial in zip(self._state, self._initial, strict=True):
                array[:, chosen] = initial
        if begun:
            for array, *given in zip(self._state, *begun_with, strict=True):
                array[:, begun] = np.concatenate(given, axis=1)

    def _copy_in(self, job: Job, first: int, number: int, rows: list[int]) -> list[int]:
        """Copies the values of sequences to the regions that begin at `rows`; returns the sequences' lengths."""
        if job.size == 1 and job.steps <= self._region:
            self._regions[rows[0] : rows[0] + job.steps] = job.values
            return [job.steps]
        offsets = job.offsets[first : first + number + 1].tolist()
        lengths = [end - begin for begin, end in itertools.pairwise(offsets)]
        length = lengths[0]
        if number > 1 and length <= self._region and lengths.count(length) == number:
            block = job.values[offsets[0] : offsets[-1]].reshape(number, length, -1)
            regions = self._regions.reshape(-1, self._region, block.shape[2])
            regions[[row // self._region for row in rows], :length] = block
            return lengths
        for row, begin, length in zip(rows, offsets, lengths, strict=False):
            self._long += length > self._region
            length = min(length, self._region)
            self._regions[row : row + length] = job.values[begin : begin + length]
        return lengths

    def drop_cancelled(self) -> None:
        """Frees the lanes of cancelled jobs."""
        self._free([column for column, job in enumerate(self._jobs) if job and job.cancelled])

    def clear(self) -> Iterable[Job]:
        """Frees every lane and returns the jobs that had one."""
        jobs = {job: None for job in self._jobs if job}
        self._jobs.clear()
        self._holes.clear()
        self._table[_INTERACTIVE:] = 0
        self.count = self.interactive = self._exact = self._long = 0
        return jobs

    def plan(self, cost: TickCost, alert: bool) -> int:
        """Chooses the timesteps of the next tick; see scheduler.tick_steps."""
        self._settle()
        # Few lanes may run more timesteps than all, in no more time.
        return tick_steps(
            self._max_steps if self.interactive else min(self._region, len(self._input) // self.count),
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
        x, state = self._gather(steps)
        begin = time.perf_counter()
        result = self.model.runtime.run(x, state)
        seconds = time.perf_counter() - begin
        return self._scatter(steps, result, emit), seconds

    def fits_single(self, job: Job) -> bool:
        """Returns True if a job is one sequence of at most a tick, for `run_single`; only without lanes in use."""
        return job.size == 1 and job.steps <= (self._max_steps if job.interactive else self._region)

    def run_single(self, job: Job, emit: Emit) -> None:
        """Runs a job of one sequence by itself, without a lane."""
        logits, states, final = self.model.runtime.run(job.values[:, np.newaxis], job.initial_state or self._initial)
        if isinstance(job, ChunkJob):
            emit((job, job.steps_done(logits[:, 0], states[:, 0])))
            emit((job, job.ended(tuple(array[:, 0] for array in final))))
        elif isinstance(job, StepsJob):
            job.make_results()
            job.logits[:], job.states[:] = logits[:, 0], states[:, 0]
            job.lanes_done(_FIRST, logits[-1], final)
            emit((job, job))
        else:
            job.lanes_done(_FIRST, logits[-1], final if job.keeps_states else None)
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
            regions = self._table[_REGION, holes]
            self._table[:, holes] = self._table[:, movers]
            # The values stay where they are: the lanes change regions.
            self._table[_REGION, movers] = regions
            self._table[_INTERACTIVE:, movers] = 0
            for array in self._state:
                array[:, holes] = array[:, movers]

    def _gather(self, steps: int) -> tuple[Float32Array, State]:
        """Returns the input of a tick, [steps, lanes, features], and the states of the lanes; only after `_settle`.

        Past a lane's end the input holds values of other lanes: by causality, no reported result depends on them.
        """
        count = self.count
        if self._long:
            self._refill(steps)
        x = self._input[: steps * count]
        rows = self._table[_ROW, :count] + self._steps[:steps]
        # Clipped at the last region; results past it are not reported.
        self._regions.take(rows.reshape(-1), axis=0, out=x, mode="clip")
        states = tuple(np.ascontiguousarray(array[:, :count]) for array in self._state)
        return x.reshape(steps, count, -1), states

    def _scatter(self, steps: int, result: TickResult, emit: Emit) -> int:
        """Reports the result of a tick, advances every lane, and frees those at their end.

        Returns:
            Computed timesteps that belonged to sequences.
        """
        count = self.count
        for array, final in zip(self._state, result.final_state, strict=True):
            array[:, :count] = final
        if self.interactive:
            self._report(steps, result, emit)
        left = self._table[_LEFT, :count]
        left -= steps
        self._table[_ROW, :count] += steps
        ended = np.flatnonzero(left <= 0)
        if not len(ended):
            return count * steps
        over = left[ended]
        self._end(ended, steps - 1 + over, result, emit)
        return count * steps + int(over.sum())

    def _refill(self, steps: int) -> None:
        """Copies the next values of long lanes whose region has too few for the next tick."""
        table = self._table[:, : self.count]
        needed = table[_ROW] + np.minimum(table[_LEFT], steps) - table[_REGION]
        for column in np.flatnonzero(needed > self._region).tolist():
            job = self._jobs[column]
            assert job is not None
            index, left, _, row = table[:4, column].tolist()
            begin = int(job.offsets[index + 1]) - left
            length = min(left, self._region)
            self._regions[row : row + length] = job.values[begin : begin + length]
            table[_ROW, column] = row
            self._long -= length == left

    def _report(self, steps: int, result: TickResult, emit: Emit) -> None:
        """Reports the steps of interactive jobs."""
        columns = np.flatnonzero(self._table[_INTERACTIVE, : self.count])
        together: dict[StepsJob, list[int]] = {}
        for column, left in zip(columns.tolist(), self._table[_LEFT, columns].tolist(), strict=True):
            job = self._jobs[column]
            if isinstance(job, StepsJob):
                together.setdefault(job, []).append(column)
                continue
            assert isinstance(job, ChunkJob)
            ran = min(steps, left)
            emit((job, job.steps_done(result.logits[:ran, column], result.states[:ran, column])))
        for several, own in together.items():
            index, left = self._table[[_INDEX, _LEFT]][:, own]
            row = several.offsets[index + 1] - left
            for step in range(steps):
                # The tick ends with the first interactive lane that does, so all of them run every step.
                several.logits[row + step] = result.logits[step, own]
                several.states[row + step] = result.states[step, own]

    def _end(self, ended: NDArray[np.int64], last: NDArray[np.int64], result: TickResult, emit: Emit) -> None:
        """Passes the last steps of ended lanes, at rows `last` of the result, to their jobs, and frees the lanes."""
        columns = ended.tolist()
        groups: dict[Job, list[int]] = {}
        for place, column in enumerate(columns):
            job = self._jobs[column]
            assert job is not None
            if job in groups:
                groups[job].append(place)
            else:
                groups[job] = [place]
        kept: State | None = None
        if any(job.keeps_states for job in groups):
            if self.model.states_are_state:
                kept = (result.states[last, ended][np.newaxis],)
            else:
                # The tick ended with every lane whose state is wanted; those of other lanes are not read.
                kept = tuple(array[:, ended] for array in self._state)
        logits = result.logits[last, ended]
        indices = self._table[_INDEX, ended]
        answered: list[BatchJob] = []
        for job, places in groups.items():
            if isinstance(job, ChunkJob):
                emit((job, job.ended(tuple(array[:, places[0]] for array in kept or ()))))
                continue
            assert isinstance(job, BatchJob)
            # A slice costs less than a selection.
            begin, end = places[0], places[-1] + 1
            chosen = slice(begin, end) if end - begin == len(places) else np.array(places)
            state = tuple(array[:, chosen] for array in kept) if kept and job.keeps_states else None
            if job.lanes_done(indices[chosen], logits[chosen], state):
                answered.append(job)
        complete([batch for batch in answered if not batch.interactive])
        for batch in answered:
            emit((batch, batch))
        self._free(columns)

    def _free(self, columns: list[int]) -> None:
        for column in columns:
            self._jobs[column] = None
        self._holes += columns
        self.count -= len(columns)
        if self.interactive or self._exact:
            special = self._table[_INTERACTIVE:, columns]
            self._table[_INTERACTIVE:, columns] = 0
            self.interactive -= int(special[0].sum())
            self._exact -= int(special[1].sum())
        if self._long:
            _, left, row, region, *_ = self._table[:, columns]
            self._long -= int((row + left > region + self._region).sum())


def _aligned(shape: tuple[int, ...], dtype: DTypeLike = np.float32) -> NDArray[Any]:
    """Returns zeros, aligned to a cache line."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.zeros(size + _ALIGNMENT, np.uint8)
    begin = -raw.ctypes.data % _ALIGNMENT
    return raw[begin : begin + size].view(dtype).reshape(shape)
