"""Joins the short chunks of one turn of the event loop, from all streams: those of one model become one job."""

import asyncio
from collections import defaultdict
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple
from weakref import WeakValueDictionary

import numpy as np

from unroll_engine.arrays import first_not_finite, matrix, to_bytes
from unroll_engine.async_engine import AsyncEngine
from unroll_engine.errors import InvalidRequestError, RequestError
from unroll_engine.jobs import StepsJob
from unroll_engine.models.loader import Model
from unroll_engine.models.spec import Float32Array
from unroll_engine.observer import Trace
from unroll_proto.v1 import unroll_pb2 as pb
from unroll_server.api.native.states import StateTable
from unroll_server.sequence import REPLAY_CHUNKS

if TYPE_CHECKING:
    from unroll_server.api.native.answers import AnswerQueue
    from unroll_server.api.native.sequence import StreamSequence


JOINED_STEPS = 16
"""Most timesteps of a chunk that is joined: it is answered when the longest of its job is done."""
JOINED_SEQUENCES = 1024
"""Most sequences of a job. Larger jobs would not be faster, and would use more memory at once."""


class Group:
    """Open sequences whose chunks can be one job.

    Attributes:
        model: Their model version.
        sizes: Bytes of the chunks that are joined, a whole number of timesteps.
        owner: Identity of their caller, for its quota.
        trace: The trace of their call; None if it is not traced.
        table: Holds their states.
        waiting: Those with a chunk that starts in the next turn of the event loop.
    """

    __slots__ = ("__weakref__", "model", "owner", "sizes", "table", "trace", "waiting")

    def __init__(self, model: Model, owner: str, trace: Trace | None, max_steps: int) -> None:
        self.model = model
        step = 4 * model.spec.input_size
        self.sizes = range(step, max_steps * step + 1, step)
        self.owner = owner
        self.trace = trace
        self.table = StateTable(model.spec)
        self.waiting: list[StreamSequence] = []


class ChunkJoiner:
    """Starts the chunks of open sequences, and answers them. A sequence has at most one here at a time.

    Args:
        engine: Runs the jobs.
        max_steps: Most timesteps of a chunk.
    """

    def __init__(self, engine: AsyncEngine, max_steps: int) -> None:
        self._max_steps = min(JOINED_STEPS, engine.tick_steps, max_steps)
        self._engine = engine
        # Kept by the open sequences alone.
        self._groups: WeakValueDictionary[tuple[Model, str, Trace | None], Group] = WeakValueDictionary()

    def group(self, model: Model, owner: str, trace: Trace | None) -> Group:
        """Returns the group for a new sequence; see Group."""
        key = model, owner, trace
        group = self._groups.get(key)
        if group is None:
            group = self._groups[key] = Group(*key, self._max_steps)
        return group

    def schedule(self, group: Group) -> None:
        """Starts the chunks of those that wait in a group in the next turn of the event loop."""
        asyncio.get_running_loop().call_soon(self._start, group)

    def _start(self, group: Group) -> None:
        sequences, group.waiting = group.waiting, []
        for begin in range(0, len(sequences), JOINED_SEQUENCES):
            self._start_job(group, sequences[begin : begin + JOINED_SEQUENCES])

    def _start_job(self, group: Group, sequences: "list[StreamSequence]") -> None:
        sequences = [each for each in sequences if not each.closed]
        if not sequences:
            return
        model = group.model
        chunks = [each.joined for each in sequences]
        values = matrix(b"".join(chunks), model.spec.input_size)
        width = 4 * model.spec.input_size
        offsets = np.fromiter(accumulate([len(each) // width for each in chunks], initial=0), np.int64)
        if first_not_finite(values):
            self._start_job(group, self._refuse_not_finite(sequences, values, offsets.tolist()))
            return
        states = group.table.read([each.row for each in sequences])
        job = StepsJob(model, values, offsets, states, keeps_states=True, owner=group.owner, trace=group.trace)
        try:
            self._engine.start(job)
            job.on_end = partial(self._ended, job, sequences)
        except RequestError as error:
            if len(sequences) == 1:
                sequences[0].end_joined(error)
                return
            # There may be room for some of them.
            for each in sequences:
                self._start_job(group, [each])

    @staticmethod
    def _refuse_not_finite(
        sequences: "list[StreamSequence]", values: Float32Array, offsets: list[int]
    ) -> "list[StreamSequence]":
        """Refuses the chunks with values that are not finite; returns the sequences of the others."""
        good = []
        for sequence, begin, end in zip(sequences, offsets, offsets[1:], strict=False):
            if where := first_not_finite(values[begin:end]):
                problem = f"step {where[0]} of the chunk, feature {where[1]} is not finite"
                sequence.end_joined(InvalidRequestError(problem, "values"))
            else:
                good.append(sequence)
        return good

    def _ended(self, job: StepsJob, sequences: "list[StreamSequence]", _: None) -> None:
        del job.on_end
        self._engine.end(job)
        if job.error:
            for sequence in sequences:
                sequence.end_joined(job.error)
            return
        lost = set(job.lost)
        done = [index for index, each in enumerate(sequences) if not (each.closed or index in lost)]
        if done:
            self._apply(job, sequences, done)
        for index in job.lost:
            sequences[index].end_joined(job.not_finite())

    @staticmethod
    def _apply(job: StepsJob, sequences: "list[StreamSequence]", done: list[int]) -> None:
        """Applies the chunks of some sequences, and answers them."""
        final = job.final_state
        assert final is not None
        if len(done) < len(sequences):
            final = tuple([tensor[:, done] for tensor in final])
        sequences[0].group.table.write([sequences[index].row for index in done], final)
        results = _Results(job, to_bytes(job.states), to_bytes(job.logits), job.offsets.tolist())
        streams: defaultdict[AnswerQueue, list[int]] = defaultdict(list)
        for index in done:
            streams[sequences[index].answers].append(index)
        for answers, indices in streams.items():
            results.answer(answers, sequences, indices)


class _Results(NamedTuple):
    """The results of a job.

    Attributes:
        job: The job.
        states: float32 [total_steps, hidden_size].
        logits: float32 [total_steps, output_size].
        offsets: First row of each sequence in them.
    """

    job: StepsJob
    states: bytes
    logits: bytes
    offsets: list[int]

    def answer(self, answers: "AnswerQueue", sequences: "list[StreamSequence]", indices: list[int]) -> None:
        """Answers the chunks of the sequences of one stream, at some indices of the job's sequences."""
        job, states, logits, offsets = self
        assert job.initial_state is not None
        # What the replay window would drop at once is not put into it. Copied: a view would keep the whole job.
        skipped = max(0, len(indices) - REPLAY_CHUNKS)
        before = tuple([tensor[:, indices[skipped:]] for tensor in job.initial_state])
        # In lists: each append to a field of a message looks for the field.
        keys, first_steps, counts, batch_states, batch_logits = [], [], [], [], []
        expected = size = 0
        answered = [sequences[index] for index in indices]
        begins, ends = [offsets[index] for index in indices], [offsets[index + 1] for index in indices]
        kept = zip(answered[skipped:], begins[skipped:], ends[skipped:], strict=True)
        for lane, (sequence, begin, end) in enumerate(kept):
            sequence.record(end - begin, before, lane)
        for sequence, begin, end in zip(answered, begins, ends, strict=True):
            first_step, count = sequence.step, end - begin
            sequence.step = first_step + count
            sequence.joined = b""
            expected += sequence.expected
            state, logit = sequence.reported(first_step, begin, end, states, logits)
            if sequence.in_batch:
                keys.append(sequence.key)
                first_steps.append(first_step)
                counts.append(count)
                batch_states.append(state)
                batch_logits.append(logit)
                size += len(state) + len(logit)
            else:
                sequence.put_steps(first_step, count, state, logit)
        answers.bytes -= expected
        if keys:
            # Filled in place: a message that is given to another one is copied.
            response = pb.UnrollResponse()
            batch = response.steps_batch
            batch.keys.extend(keys)
            batch.first_steps.extend(first_steps)
            batch.counts.extend(counts)
            batch.states.extend(batch_states)
            batch.logits.extend(batch_logits)
            answers.put(response, size)
        answered[0].on_answered(answered)
