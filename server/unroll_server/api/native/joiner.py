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
"""Timesteps of a chunk that is joined, at most: it is answered when the longest of the others is done."""


class Group(NamedTuple):
    """The key of chunks that can be one job.

    Attributes:
        model: Their model version.
        owner: Identity of their caller, for its quota.
        trace: The trace of their call; None if it is not traced.
    """

    model: Model
    owner: str
    trace: Trace | None


class ChunkJoiner:
    """Starts the chunks of open sequences, and answers them. A sequence has at most one here at a time.

    Args:
        engine: Runs the jobs.
        max_steps: Timesteps of a chunk, at most.

    Attributes:
        max_steps: Timesteps of a chunk that is joined, at most.
    """

    def __init__(self, engine: AsyncEngine, max_steps: int) -> None:
        self.max_steps = min(JOINED_STEPS, engine.tick_steps, max_steps)
        self._engine = engine
        self._waiting: defaultdict[Group, list[StreamSequence]] = defaultdict(list)
        # Kept by the open sequences alone.
        self._tables: WeakValueDictionary[Model, StateTable] = WeakValueDictionary()

    def table(self, model: Model) -> StateTable:
        """Returns the table for the states of a model's sequences."""
        table = self._tables.get(model)
        if table is None:
            table = self._tables[model] = StateTable(model.spec)
        return table

    def add(self, sequence: "StreamSequence") -> None:
        """Takes the chunk that a sequence has joined; see StreamSequence.join."""
        if not self._waiting:
            asyncio.get_running_loop().call_soon(self._start)
        self._waiting[sequence.group].append(sequence)

    def _start(self) -> None:
        waiting, self._waiting = self._waiting, defaultdict(list)
        for group, sequences in waiting.items():
            self._start_job(group, sequences)

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
        states = sequences[0].table.read([each.row for each in sequences])
        job = StepsJob(model, values, offsets, states, group.owner, group.trace)
        job.on_end = partial(self._ended, job, sequences)
        try:
            self._engine.start(job)
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
        sequences[0].table.write([sequences[index].row for index in done], final)
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
        offsets: Where each sequence begins in them.
    """

    job: StepsJob
    states: bytes
    logits: bytes
    offsets: list[int]

    def answer(self, answers: "AnswerQueue", sequences: "list[StreamSequence]", indices: list[int]) -> None:
        """Answers the chunks of the sequences of one stream, at some indices of the job's sequences."""
        job, states, logits, offsets = self
        before = job.initial_state
        assert before is not None
        # What the replay window would drop at once is not put into it.
        skipped = len(indices) - REPLAY_CHUNKS
        batch = _Batch([], [], [], [], [])
        expected = size = 0
        for number, index in enumerate(indices):
            sequence, begin, end = sequences[index], offsets[index], offsets[index + 1]
            first_step, count = sequence.step, end - begin
            if number >= skipped:
                sequence.record(count, before, index)
            sequence.step = first_step + count
            sequence.joined = b""
            expected += sequence.expected
            reported = sequence.reported(first_step, begin, end, states, logits)
            if sequence.in_batch:
                batch.keys.append(sequence.key)
                batch.first_steps.append(first_step)
                batch.counts.append(count)
                batch.states.append(reported[0])
                batch.logits.append(reported[1])
                size += len(reported[0]) + len(reported[1])
            else:
                sequence.put_steps(first_step, count, *reported)
        answers.expect(-expected)
        if batch.keys:
            answers.put(pb.UnrollResponse(steps_batch=pb.StepsBatch(**batch._asdict())), size)
        answered = [sequences[index] for index in indices]
        answered[0].on_answered(answered)


class _Batch(NamedTuple):
    """The fields of a StepsBatch."""

    keys: list[str]
    first_steps: list[int]
    counts: list[int]
    states: list[bytes]
    logits: list[bytes]
