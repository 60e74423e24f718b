"""One sequence of a stream: its options, the messages that wait for it, and the answers to its chunks."""

from collections import deque
from collections.abc import Callable

from unroll_engine.arrays import to_bytes
from unroll_engine.async_engine import AsyncEngine
from unroll_engine.errors import RequestError
from unroll_engine.models.spec import Float32Array, State
from unroll_engine.snapshots import encode_snapshot
from unroll_proto.v1 import unroll_pb2 as pb
from unroll_server.api.native.answers import AnswerQueue
from unroll_server.repository.version import LoadedVersion
from unroll_server.sequence import OpenSequence, ReplayWindow
from unroll_server.status import status_of


class StreamSequence(OpenSequence):
    """A sequence that is open under a key of a stream. It holds a reference to its version until it is closed.

    Args:
        key: The key.
        request: The message that opened it.
        state: The state that it begins with; None is the zero state.
        engine: Runs its chunks.
        version: The model version.
        window: The replay window of the stream.
        answers: Takes the answers.
        on_answered: Called when the last chunk is answered.

    Attributes:
        key: As given.
        closed: True once it is closed.
        pending: Messages that wait, with their sizes in bytes; None if none do.
        size: Bytes of the message of the chunk that runs.
    """

    __slots__ = (
        "_answers",
        "_every",
        "_expected",
        "_logits",
        "_on_answered",
        "_states",
        "_version",
        "_width",
        "closed",
        "key",
        "pending",
        "size",
    )

    def __init__(
        self,
        key: str,
        request: pb.OpenSequence,
        state: State | None,
        engine: AsyncEngine,
        version: LoadedVersion,
        window: ReplayWindow,
        answers: AnswerQueue,
        on_answered: "Callable[[StreamSequence], None]",
    ) -> None:
        super().__init__(engine, version.model, request.initial_state.step, state, window)
        version.acquire()
        self.key = key
        self.closed = False
        self.pending: deque[tuple[pb.UnrollRequest, int]] | None = None
        self.size = 0
        self._version = version
        self._answers = answers
        self._on_answered = on_answered
        self._every = request.every or 1
        self._states = request.return_states
        self._logits = request.return_logits
        # Bytes of the answer to one step, and to the piece that runs.
        self._width = 4 * (self._states * version.spec.hidden_size + self._logits * version.spec.output_size)
        self._expected = 0

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
        self._version.release()

    def answer_chunk(self, first_step: int, values: Float32Array, size: int) -> None:
        """Begins to answer a chunk, whose message has `size` bytes; see OpenSequence.start."""
        self.start(first_step, values)
        self.size = size
        self._expect()

    def on_steps(self, first_step: int, logits: Float32Array, states: Float32Array) -> None:
        """See OpenSequence."""
        count, every = len(states), self._every
        if every > 1:
            # Reported are the steps s with (s + 1) % every == 0.
            reported = slice(every - 1 - first_step % every, None, every)
            logits, states = logits[reported], states[reported]
        steps = pb.Steps(first_step=first_step, count=count)
        size = 0
        if self._states:
            steps.states = to_bytes(states)
            size = states.nbytes
        if self._logits:
            steps.logits = to_bytes(logits)
            size += logits.nbytes
        self._answers.put(pb.UnrollResponse(key=self.key, steps=steps), size)

    def on_pause(self) -> None:
        """See OpenSequence."""
        self._expect_nothing()
        self._answers.when_room(self._proceed)

    def on_end(self, error: RequestError | None) -> None:
        """See OpenSequence."""
        self._expect_nothing()
        if error:
            error.rename({"values": "chunk.values"})
            self._answers.put(pb.UnrollResponse(key=self.key, error=status_of(error)))
        self._on_answered(self)

    def _proceed(self) -> None:
        self.resume()
        self._expect()

    def _expect(self) -> None:
        self._expected = self.next_piece * self._width // self._every
        self._answers.expect(self._expected)

    def _expect_nothing(self) -> None:
        self._answers.expect(-self._expected)
        self._expected = 0
