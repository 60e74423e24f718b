"""One sequence of a stream: its options, the messages that wait for it, and the answers to its chunks."""

from collections import deque
from collections.abc import Callable
from zlib import crc32

import numpy as np

from unroll_engine.arrays import to_bytes
from unroll_engine.async_engine import AsyncEngine
from unroll_engine.errors import RequestError
from unroll_engine.models.spec import Float32Array, State
from unroll_engine.snapshots import encode_snapshot
from unroll_proto.v1 import unroll_pb2 as pb
from unroll_server import caller
from unroll_server.api.native.answers import AnswerQueue
from unroll_server.api.native.joiner import ChunkJoiner
from unroll_server.repository.version import LoadedVersion
from unroll_server.sequence import OpenSequence, ReplayWindow
from unroll_server.status import status_of


class StreamSequence(OpenSequence):
    """A sequence that is open under a key of a stream. It holds a reference to its version until it is closed.

    Args:
        key: The key.
        request: The message that opened it.
        state: The initial state; None for the zero state.
        engine: Runs its chunks.
        joiner: Runs its short chunks, with those of others.
        version: The model version.
        window: The replay window of the stream.
        answers: Queue of the answers.
        on_answered: Called with sequences of the stream whose chunks are answered.

    Attributes:
        key: As given.
        answers: As given.
        on_answered: As given.
        closed: True once it is closed.
        pending: Messages that wait, with their sizes in bytes and whether they came in a batch; None if none do.
        size: Bytes of the message of the chunk that runs.
        expected: Bytes of the answer that is being computed.
        in_batch: True if that came with others in one message.
        joined: The values of the chunk that the joiner runs; empty if it runs none.
        group: The sequences whose chunks can be joined with its own.
        row: Row of the state in the table of the group.
    """

    __slots__ = (
        "_every",
        "_joiner",
        "_logits",
        "_states",
        "_version",
        "_width",
        "answers",
        "closed",
        "expected",
        "group",
        "in_batch",
        "joined",
        "key",
        "on_answered",
        "pending",
        "row",
        "size",
    )

    def __init__(
        self,
        key: str,
        request: pb.OpenSequence,
        state: State | None,
        engine: AsyncEngine,
        joiner: ChunkJoiner,
        version: LoadedVersion,
        window: ReplayWindow,
        answers: AnswerQueue,
        on_answered: "Callable[[list[StreamSequence]], None]",
    ) -> None:
        model, spec, call = version.model, version.spec, caller.current.get()
        self.group = joiner.group(model, call.identity, call.trace)
        self.row = self.group.table.allocate()
        super().__init__(engine, model, request.initial_state.step, state, window)
        version.acquire()
        self.key = key
        self.answers = answers
        self.on_answered = on_answered
        self.closed = False
        self.pending: deque[tuple[pb.UnrollRequest, int, bool]] | None = None
        self.size = 0
        self.in_batch = False
        self.joined = b""
        self._joiner = joiner
        self._version = version
        self._every = request.every or 1
        self._states = 4 * spec.hidden_size if request.return_states else 0
        self._logits = 4 * spec.output_size if request.return_logits or spec.step else 0
        self._width = self._states + self._logits
        self.expected = 0

    @property
    def state(self) -> State | None:
        """See OpenSequence."""
        return tuple([tensor[:, 0] for tensor in self.group.table.read([self.row])])

    @state.setter
    def state(self, state: State | None) -> None:
        if state is not None:
            self.group.table.write([self.row], tuple([tensor[:, np.newaxis] for tensor in state]))

    @property
    def busy(self) -> bool:
        """See OpenSequence."""
        return bool(self.joined) or self._chunk is not None

    def snapshot(self) -> pb.Snapshot:
        """Returns a snapshot of the state between two chunks."""
        return encode_snapshot(self.model.spec, self.step, self.state)

    def closing(self, reason: "pb.SequenceClosed.Reason.ValueType") -> pb.UnrollResponse:
        """Returns the last answer of a sequence that closes."""
        return pb.UnrollResponse(key=self.key, closed=pb.SequenceClosed(reason=reason, snapshot=self.snapshot()))

    def close(self) -> None:
        """Drops the chunk that runs, if any, and releases the version."""
        self.cancel()
        self.closed = True
        self.group.table.release(self.row)
        self._version.release()

    def join(self, first_step: int, values: bytes, size: int, in_batch: bool) -> bool:
        """Gives a chunk to the joiner, if it is short and the next one, and none runs; returns False if not.

        Args:
            first_step: Number of its first step.
            values: float32 [steps, input_size].
            size: Bytes of its message.
            in_batch: True if it came with others in one message.
        """
        count, sizes = len(values), self.group.sizes
        if first_step != self.step or count not in sizes or self.joined or self._chunk:
            return False
        self.joined, self.size, self.in_batch = values, size, in_batch
        # As in _expect; this is done for each chunk of a message with many.
        self.expected = expected = count // sizes.step * self._width // self._every
        self.answers.bytes += expected
        waiting = self.group.waiting
        if not waiting:
            self._joiner.schedule(self.group)
        waiting.append(self)
        return True

    def end_joined(self, error: RequestError) -> None:
        """Refuses the chunk that the joiner was to run. The sequence is as it was before it."""
        if not self.closed:
            self.joined = b""
            self.on_end(error)

    def record(self, steps: int, before: State, index: int) -> None:
        """Makes the next chunk, which the joiner has run, replayable; see OpenSequence."""
        self._record(self.step, steps, crc32(self.joined), before, index)

    def reported(self, first_step: int, begin: int, end: int, states: bytes, logits: bytes) -> tuple[bytes, bytes]:
        """Returns the states and logits that the answer to some steps holds.

        Args:
            first_step: Number of the first step.
            begin: Row of the first step in the states and logits of a job.
            end: Row behind the last one.
            states: float32 [rows, hidden_size].
            logits: float32 [rows, output_size].
        """
        state, logit, every = self._states, self._logits, self._every
        if every == 1:
            return states[begin * state : end * state], logits[begin * logit : end * logit]
        # The steps s with (s + 1) % every == 0 are reported.
        rows = range(begin + every - 1 - first_step % every, end, every)
        return (
            b"".join([states[row * state : (row + 1) * state] for row in rows]),
            b"".join([logits[row * logit : (row + 1) * logit] for row in rows]),
        )

    def answer_chunk(self, first_step: int, values: Float32Array, size: int) -> None:
        """Begins to answer a chunk, whose message has `size` bytes; see OpenSequence.start."""
        self.start(first_step, values)
        self.size = size
        self._expect(self.next_piece)

    def on_steps(self, first_step: int, logits: Float32Array, states: Float32Array) -> None:
        """See OpenSequence."""
        count = len(states)
        raw_states = to_bytes(states) if self._states else b""
        raw_logits = to_bytes(logits) if self._logits else b""
        self.put_steps(first_step, count, *self.reported(first_step, 0, count, raw_states, raw_logits))

    def put_steps(self, first_step: int, count: int, states: bytes, logits: bytes) -> None:
        """Puts the answer to some steps."""
        response = pb.UnrollResponse(key=self.key)
        # Filled in place: a message that is given to another one is copied.
        steps = response.steps
        steps.first_step = first_step
        steps.count = count
        if states:
            steps.states = states
        if logits:
            steps.logits = logits
        self.answers.put(response, len(states) + len(logits))

    def on_pause(self) -> None:
        """See OpenSequence."""
        self._expect_nothing()
        self.answers.when_room(self._proceed)

    def on_end(self, error: RequestError | None) -> None:
        """See OpenSequence."""
        self._expect_nothing()
        if error:
            error.rename({"values": "chunk.values"})
            self.answers.put(pb.UnrollResponse(key=self.key, error=status_of(error)))
        self.on_answered([self])

    def _proceed(self) -> None:
        self.resume()
        self._expect(self.next_piece)

    def _expect(self, steps: int) -> None:
        self.expected = steps * self._width // self._every
        self.answers.bytes += self.expected

    def _expect_nothing(self) -> None:
        self.answers.bytes -= self.expected
        self.expected = 0
