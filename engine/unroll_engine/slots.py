"""Slots: the sequences of one model in flight in the step kernel, which reads and writes the arrays of their jobs.

The kernel runs every sequence to its own end: nothing is padded, gathered or scattered.
"""

import time
from collections.abc import Iterable, Sequence
from itertools import pairwise

import numpy as np

from unroll_engine.jobs import BatchJob, ChunkJob, Emit, Job, Progress, StepsJob, complete
from unroll_engine.kernel import Network, SequenceQueue
from unroll_engine.models.loader import Model
from unroll_engine.models.spec import State
from unroll_engine.readout import classify
from unroll_engine.scheduler import Slice, TickCost, alert_steps

_FEW_LANES_STEPS = 128
"""Most timesteps of a tick of few bulk lanes."""
_UNBOUNDED = 2**62


class Slots:
    """The sequences of one model in flight in the step kernel; the counterpart of Lanes.

    Args:
        model: The model to run them on.
        network: Its network.
        capacity: Most sequences in flight on one thread.
        max_steps: Most timesteps of a tick of all sequences.
        threads: Threads that compute a tick.

    Attributes:
        count: Sequences in flight.
        interactive: Sequences of interactive jobs.
    """

    def __init__(self, model: Model, network: Network, capacity: int, max_steps: int, threads: int) -> None:
        self.model = model
        self.count = 0
        self.interactive = 0
        self._network = network
        self._queue = SequenceQueue(network, slots=capacity, threads=threads)
        self._max_steps = max_steps
        self._capacity = capacity
        self._threads = threads
        self._batches: dict[int, tuple[BatchJob, int]] = {}  # by ticket, with the sequences of it in flight
        self._left: dict[int, int] = {}  # by ticket of a StepsJob: the most steps that a sequence has left to run
        self._chunks: dict[int, _Chunk] = {}

    @property
    def width(self) -> int:
        """Sequences that one thread computes."""
        return -(-self.count // self._threads)

    @property
    def jobs(self) -> Iterable[Job]:
        """The jobs in flight; one whose sequences joined at several times is repeated."""
        yield from (job for job, _ in self._batches.values())
        yield from (chunk.job for chunk in self._chunks.values())

    def join(self, slices: Sequence[Slice[Job]]) -> None:
        """Puts sequences into free slots."""
        for job, first, number in slices:
            if isinstance(job, ChunkJob):
                chunk = _Chunk(job)
                ticket = self._queue.submit(
                    job.values, chunk.initial, final_state=chunk.final, states=chunk.states, logits=chunk.logits
                )
                self._chunks[ticket] = chunk
                self.interactive += 1
            else:
                if first == 0:
                    job.make_results()
                offsets = job.offsets[first : first + number + 1].tolist()
                states = job.states if isinstance(job, StepsJob) else None
                ticket = self._queue.submit_batch(
                    job.values, offsets, first, job.initial_state, job.final_state, job.logits, states
                )
                self._batches[ticket] = job, number
                if states is not None:
                    self._left[ticket] = max(end - begin for begin, end in pairwise(offsets))
                    self.interactive += number
            self.count += number

    def drop_cancelled(self) -> None:
        """Frees the slots of cancelled jobs."""
        self._drop({ticket for ticket, (job, _) in self._batches.items() if job.cancelled})
        self._drop({ticket for ticket, chunk in self._chunks.items() if chunk.job.cancelled})

    def clear(self) -> Iterable[Job]:
        """Frees every slot and returns the jobs that had one."""
        jobs = dict.fromkeys(self.jobs)
        self._drop({*self._batches, *self._chunks})
        return jobs

    def plan(self, cost: TickCost, alert: bool) -> int:
        """Chooses the timesteps of the next tick: it ends with the first interactive job, which is answered at once."""
        if self.interactive:
            limit = min(self._max_steps, *self._left.values(), *[chunk.left for chunk in self._chunks.values()])
        else:
            # Few sequences may run more timesteps than all, in no more time.
            limit = min(_FEW_LANES_STEPS, self._max_steps * self._capacity // self.width)
        return max(1, min(limit, alert_steps(cost, self.width)) if alert else limit)

    def run(self, steps: int, emit: Emit) -> tuple[int, float]:
        """Runs a planned tick.

        Returns:
            Computed timesteps, and the seconds of the kernel's run.
        """
        begin = time.perf_counter()
        if self.interactive:
            progress = self._queue.advance(_UNBOUNDED, rounds=steps)
        else:
            # `steps` of every sequence on average: longer sequences use the steps that ended ones leave.
            progress = self._queue.advance(steps * self.count - self.count + 1)
        seconds = time.perf_counter() - begin
        for ticket in self._left:
            self._left[ticket] -= steps
        self._report(steps, emit)
        answered: list[BatchJob] = []
        for ticket, _, number in progress.ended:
            if ticket not in self._batches:  # a chunk, or dropped
                continue
            job = self._take_off(ticket, number)
            if job.sequences_done(number):
                answered.append(job)
        complete([job for job in answered if not job.interactive])
        for batch in answered:
            emit((batch, batch))
        return progress.steps, seconds

    def fits_single(self, job: Job) -> bool:
        """Returns True if a job is one sequence of at most a tick, for `run_single`, while nothing is in flight."""
        return job.size == 1 and job.steps <= (self._max_steps if job.interactive else _FEW_LANES_STEPS)

    def run_single(self, job: Job, emit: Emit) -> None:
        """Runs a job of one sequence by itself, past the slots, at the lowest latency."""
        if isinstance(job, ChunkJob):
            chunk = _Chunk(job)
            self._network.run_one(
                job.values, chunk.initial, final_state=chunk.final, states=chunk.states, logits=chunk.logits
            )
            emit((job, Progress(chunk.logits, chunk.states, chunk.final)))
            return
        job.make_results()
        initial, final = job.initial_state and _only(job.initial_state), job.final_state and _only(job.final_state)
        if isinstance(job, StepsJob):
            self._network.packed.run_one(job.values, initial, final, job.states, job.logits)
        else:
            self._network.packed.run_one(job.values, initial, final, None, job.logits[0])
            job.probabilities, job.labels = classify(job.logits, job.model.spec.step)
        emit((job, job))

    def _report(self, steps: int, emit: Emit) -> None:
        """Reports the steps of interactive jobs that a tick computed, and frees those at their end."""
        for ticket, chunk in list(self._chunks.items()):
            job, begin = chunk.job, chunk.job.steps - chunk.left
            end = min(begin + steps, job.steps)
            chunk.left = job.steps - end
            final = None if chunk.left else chunk.final
            emit((job, Progress(chunk.logits[begin:end], chunk.states[begin:end], final)))
            if not chunk.left:
                del self._chunks[ticket]
                self.interactive -= 1
                self.count -= 1

    def _drop(self, tickets: Iterable[int]) -> None:
        for ticket in tickets:
            self._queue.cancel(ticket)
            if ticket in self._batches:
                self._take_off(ticket, self._batches[ticket][1])
            else:
                del self._chunks[ticket]
                self.interactive -= 1
                self.count -= 1

    def _take_off(self, ticket: int, number: int) -> BatchJob:
        """Records that sequences of a batch left their slots; returns the batch."""
        job, count = self._batches.pop(ticket)
        if count > number:
            self._batches[ticket] = job, count - number
        else:
            self._left.pop(ticket, None)
        self.count -= number
        if job.interactive:
            self.interactive -= number
        return job


class _Chunk:
    """A ChunkJob in flight, with the arrays that take its results.

    Attributes:
        left: Steps left to run.
    """

    def __init__(self, job: ChunkJob) -> None:
        spec = job.model.spec
        self.job = job
        self.left = job.steps
        self.initial = _only(job.initial_state)
        self.final: State = tuple([np.empty(tensor.shape, np.float32) for tensor in spec.states])
        self.states = np.empty((job.steps, spec.hidden_size), np.float32)
        self.logits = np.empty((job.steps, spec.output_size), np.float32)


def _only(state: State | None) -> State | None:
    """Returns the state of the only sequence, [num_layers, 1, hidden_size] each, without the middle axis."""
    return None if state is None else tuple([array[:, 0] for array in state])
