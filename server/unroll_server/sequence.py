"""One open sequence of a stream: its state between chunks, and the chunks that it can answer again."""

import zlib
from collections import deque
from typing import NamedTuple, Protocol

from unroll_engine.async_engine import AsyncEngine
from unroll_engine.errors import RequestError, SequenceStateError
from unroll_engine.jobs import ChunkJob
from unroll_engine.models.loader import Model
from unroll_engine.models.spec import Float32Array, State
from unroll_server.caller import Call

REPEATABLE = 256
"""Chunks of a stream that can be answered again: the latest ones, over all its sequences."""
PIECE = 256
"""Timesteps of a chunk that the engine is given at a time: so much at most is computed for a slow reader in advance."""


class Reader(Protocol):
    """Who hears what is computed for a chunk, on the event loop."""

    def progressed(self, step: int, count: int, logits: Float32Array, states: Float32Array) -> None:
        """Steps `step` to `step + count - 1` are computed: logits [count, output_size], states [count, hidden_size]."""
        ...

    def paused(self) -> None:
        """A piece is computed and the chunk has more: `Sequence.resume` goes on."""
        ...

    def finished(self) -> None:
        """The chunk is answered and applied."""
        ...

    def failed(self, error: RequestError) -> None:
        """The chunk failed; the sequence is as it was before it."""
        ...


class _Applied(NamedTuple):
    first_step: int
    steps: int
    checksum: int
    state: State | None  # before the chunk


_Chunks = list[_Applied]
"""The chunks of a sequence that can be answered again, oldest first."""


class Repeatable:
    """The latest chunks of a stream, whose sequences forget those before; it keeps no sequence, and so no model."""

    __slots__ = ("_latest",)

    def __init__(self) -> None:
        self._latest: deque[_Chunks] = deque()

    def add(self, chunks: _Chunks) -> None:
        """Notes that a chunk was added to those of a sequence."""
        self._latest.append(chunks)
        if len(self._latest) > REPEATABLE:
            del self._latest.popleft()[0]


class _Running:
    """A chunk on its way through the engine, piece by piece; the listener of its jobs."""

    __slots__ = (
        "begin",
        "checksum",
        "first_step",
        "job",
        "position",
        "reader",
        "repeats",
        "sequence",
        "state",
        "values",
    )

    def __init__(
        self,
        sequence: "Sequence",
        first_step: int,
        values: Float32Array,
        checksum: int,
        state: State | None,
        reader: Reader,
    ) -> None:
        self.sequence = sequence
        self.first_step = first_step
        self.values = values
        self.checksum = checksum
        self.begin = state
        self.state = state
        self.reader = reader
        self.repeats = first_step != sequence.step
        self.position = 0
        self.job: ChunkJob | None = None

    def go_on(self) -> None:
        piece = self.values[self.position : self.position + PIECE] if len(self.values) > PIECE else self.values
        of = self.sequence
        job = ChunkJob(of.model, piece, self.state, self, owner=of.call.identity, trace=of.call.trace)
        of.engine.start(job)
        of.call.steps += len(piece)
        self.job = job

    def leave(self) -> None:
        if self.job is not None:
            self.sequence.engine.end(self.job)
            self.job = None

    def progressed(self, count: int, logits: Float32Array, states: Float32Array) -> None:
        """See jobs.Listener."""
        step = self.first_step + self.position
        self.position += count
        self.reader.progressed(step, count, logits, states)

    def finished(self, state: State) -> None:
        """See jobs.Listener."""
        self.leave()
        self.state = state
        if self.position < len(self.values):
            self.reader.paused()
        else:
            self.sequence._apply(self)
            self.reader.finished()

    def failed(self, error: RequestError) -> None:
        """See jobs.Listener."""
        self.leave()
        self.sequence._running = None
        self.reader.failed(error)


class Sequence:
    """A sequence on a stream. One chunk runs at a time.

    Args:
        engine: Runs it.
        model: The model version that it stays on.
        step: Timesteps consumed.
        state: After them, [num_layers, hidden_size] each; None is the zero state.
        repeatable: The stream's latest chunks.
        call: The call that it belongs to.
    """

    __slots__ = ("_applied", "_repeatable", "_running", "call", "engine", "model", "state", "step")

    def __init__(
        self,
        engine: AsyncEngine,
        model: Model,
        step: int,
        state: State | None,
        repeatable: Repeatable,
        call: Call,
    ) -> None:
        self.engine = engine
        self.model = model
        self.step = step
        self.state = state
        self.call = call
        self._repeatable = repeatable
        self._applied: _Chunks | None = None  # an idle sequence costs its state alone
        self._running: _Running | None = None

    def start(self, first_step: int, values: Float32Array, reader: Reader) -> None:
        """Begins to apply a chunk; `reader` hears how it gets on.

        A chunk that was applied before is computed again from the state that it began with, so its answer has the
        same bits, and the sequence stays where it is.

        Args:
            first_step: Number of the chunk's first step.
            values: [steps, input_size], 1 step or more.
            reader: Who hears.

        Raises:
            SequenceStateError: the chunk is neither the next one nor one of the latest.
            OverloadedError: the engine's queue is full.
        """
        checksum = zlib.crc32(values.data)
        state = self.state if first_step == self.step else self._state_before(first_step, len(values), checksum)
        running = _Running(self, first_step, values, checksum, state, reader)
        running.go_on()
        self._running = running

    def resume(self) -> None:
        """Goes on with a chunk that has paused.

        Raises:
            OverloadedError: the engine's queue is full; the sequence is as it was before the chunk.
        """
        assert self._running is not None
        try:
            self._running.go_on()
        except RequestError:
            self._running = None
            raise

    def leave(self) -> None:
        """Drops the chunk that runs, if any; its reader hears no more."""
        if self._running:
            self._running.leave()
            self._running = None

    def _apply(self, running: _Running) -> None:
        self._running = None
        if running.repeats:
            return
        applied = _Applied(running.first_step, len(running.values), running.checksum, running.begin)
        if self._applied is None:
            self._applied = []
        self._applied.append(applied)
        self._repeatable.add(self._applied)
        self.state = running.state
        self.step += applied.steps

    def _state_before(self, first_step: int, steps: int, checksum: int) -> State | None:
        latest = self._applied or ()
        for applied in latest:
            if applied.first_step == first_step:
                if (applied.steps, applied.checksum) == (steps, checksum):
                    return applied.state
                problem = f"step {first_step} was sent before, in a chunk of other values"
                raise SequenceStateError(problem, "chunk.first_step")
        repeatable = f" or again one of the last {len(latest)} chunks" if latest else ""
        problem = f"{first_step}, the sequence goes on at step {self.step}{repeatable}"
        raise SequenceStateError(problem, "chunk.first_step")
