"""Sequences that are advanced chunk by chunk: the state, the chunk that runs, the chunks that can be replayed."""

import asyncio
import math
import zlib
from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from unroll_engine.async_engine import AsyncEngine
from unroll_engine.errors import RequestError, SequenceStateError
from unroll_engine.jobs import ChunkJob
from unroll_engine.models.loader import Model
from unroll_engine.models.spec import Float32Array, State
from unroll_server import caller

REPLAY_CHUNKS = 256
"""Number of chunks in a replay window."""
PIECE_STEPS = 256
"""Most timesteps of a chunk that the engine gets at a time.

A long chunk lets others take its lane, and no more is computed in advance for a slow reader.
"""


class _AppliedChunk(NamedTuple):
    """A chunk that can be replayed.

    Attributes:
        first_step: Number of its first step.
        steps: Number of steps.
        checksum: Checksum of the values.
        before: State before it, [num_layers, hidden_size] each; None is the zero state.
        lane: Index into `before` if it holds the states of many sequences, [num_layers, sequences, hidden_size] each.
    """

    first_step: int
    steps: int
    checksum: int
    before: State | None
    lane: int | None

    @property
    def state(self) -> State | None:
        """State before the chunk."""
        if self.before is None or self.lane is None:
            return self.before
        return tuple([tensor[:, self.lane] for tensor in self.before])


class ReplayWindow:
    """The latest chunks of a stream, over all its sequences, that can be sent again and are then answered again.

    It refers to no sequence, and so to no model.
    """

    __slots__ = ("_histories",)

    def __init__(self) -> None:
        self._histories: deque[list[_AppliedChunk]] = deque()

    def add(self, history: list[_AppliedChunk], applied: _AppliedChunk) -> None:
        """Appends a chunk to the history of its sequence; the oldest chunk of all leaves its own."""
        history.append(applied)
        self._histories.append(history)
        if len(self._histories) > REPLAY_CHUNKS:
            del self._histories.popleft()[0]


@dataclass(slots=True, eq=False)
class _RunningChunk:
    """A chunk in the engine.

    Attributes:
        first_step: Number of its first step.
        values: [steps, input_size].
        checksum: Checksum of the values.
        before: State before the chunk.
        state: State before the piece that runs.
        deadline: Seconds on the engine's clock.
        computed: Steps computed.
        job: The running piece; None between two pieces.
    """

    first_step: int
    values: Float32Array
    checksum: int
    before: State | None
    state: State | None
    deadline: float
    computed: int = 0
    job: ChunkJob | None = None


class OpenSequence:
    """A sequence between its timesteps. One chunk runs at a time; an idle sequence costs its state and little else.

    Subclasses receive the results on the event loop, in `on_steps`, `on_pause` and `on_end`.

    Args:
        engine: Runs the chunks.
        model: The model version that the sequence stays on.
        step: Timesteps consumed.
        state: The state after them, [num_layers, hidden_size] each; None is the zero state.
        window: The replay window of the sequence's stream; None for no replays.

    Attributes:
        model: As given.
        step: Timesteps consumed, without the chunk that runs.
        state: The state after them.
    """

    __slots__ = ("_call", "_chunk", "_engine", "_history", "_window", "model", "state", "step")

    def __init__(
        self, engine: AsyncEngine, model: Model, step: int, state: State | None, window: ReplayWindow | None = None
    ) -> None:
        self.model = model
        self.step = step
        self.state = state
        self._engine = engine
        self._window = window
        self._call = caller.current.get()
        self._history: list[_AppliedChunk] | None = None
        self._chunk: _RunningChunk | None = None

    def on_steps(self, first_step: int, logits: Float32Array, states: Float32Array) -> None:
        """Receives the results of consecutive steps: logits [count, output_size], states [count, hidden_size].

        Both are views of a tick.
        """
        raise NotImplementedError

    def on_pause(self) -> None:
        """Handles the pause between two pieces of a chunk, which waits for `resume`."""
        raise NotImplementedError

    def on_end(self, error: RequestError | None) -> None:
        """Handles the end of a chunk; with an error, the sequence is as before the chunk."""
        raise NotImplementedError

    @property
    def busy(self) -> bool:
        """True while a chunk runs or is paused."""
        return self._chunk is not None

    @property
    def next_piece(self) -> int:
        """Timesteps of the chunk's next piece, or of the one that runs."""
        return min(PIECE_STEPS, len(self._chunk.values) - self._chunk.computed) if self._chunk else 0

    def start(self, first_step: int, values: Float32Array, deadline: float = math.inf) -> None:
        """Begins to apply a chunk.

        A chunk of the replay window is recomputed from the state before it. The answer has the same bits, and the
        sequence does not advance.

        Args:
            first_step: Number of the chunk's first step.
            values: [steps, input_size], 1 step or more.
            deadline: Seconds on the engine's clock.

        Raises:
            SequenceStateError: the chunk is neither the next one nor in the replay window.
            OverloadedError: the engine's queue is full.
        """
        checksum = 0 if self._window is None else zlib.crc32(values.data)
        state = self.state if first_step == self.step else self._state_before(first_step, len(values), checksum)
        chunk = _RunningChunk(first_step, values, checksum, state, state, deadline)
        self._run_piece(chunk)
        self._chunk = chunk

    def resume(self) -> None:
        """Runs the next piece of a paused chunk, or ends the chunk with the engine's refusal."""
        assert self._chunk is not None
        try:
            self._run_piece(self._chunk)
        except RequestError as error:
            self._chunk = None
            self.on_end(error)

    def cancel(self) -> None:
        """Drops the chunk that runs, if any; nothing more is reported of it."""
        self._end_piece()
        self._chunk = None

    def progressed(self, count: int, logits: Float32Array, states: Float32Array) -> None:
        """See jobs.Listener."""
        chunk = self._chunk
        assert chunk is not None
        first_step = chunk.first_step + chunk.computed
        chunk.computed += count
        self.on_steps(first_step, logits, states)

    def finished(self, state: State) -> None:
        """See jobs.Listener."""
        chunk = self._chunk
        assert chunk is not None
        self._end_piece()
        chunk.state = state
        if chunk.computed < len(chunk.values):
            self.on_pause()
            return
        self._chunk = None
        # Otherwise it was applied before.
        if chunk.first_step == self.step:
            self._record(chunk.first_step, len(chunk.values), chunk.checksum, chunk.before)
            self.state = state
            self.step += len(chunk.values)
        self.on_end(None)

    def failed(self, error: RequestError) -> None:
        """See jobs.Listener."""
        self.cancel()
        self.on_end(error)

    def _run_piece(self, chunk: _RunningChunk) -> None:
        values, call = chunk.values, self._call
        if len(values) > PIECE_STEPS:
            values = values[chunk.computed : chunk.computed + PIECE_STEPS]
        job = ChunkJob(self.model, values, chunk.state, self, chunk.deadline, call.identity, call.trace)
        self._engine.start(job)
        call.steps += len(values)
        chunk.job = job

    def _end_piece(self) -> None:
        if self._chunk and self._chunk.job:
            self._engine.end(self._chunk.job)
            self._chunk.job = None

    def _record(
        self, first_step: int, steps: int, checksum: int, before: State | None, lane: int | None = None
    ) -> None:
        """Makes an applied chunk replayable; see _AppliedChunk."""
        if self._window is None:
            return
        if self._history is None:
            self._history = []
        self._window.add(self._history, _AppliedChunk(first_step, steps, checksum, before, lane))

    def _state_before(self, first_step: int, steps: int, checksum: int) -> State | None:
        history = self._history or ()
        for applied in history:
            if applied.first_step == first_step:
                if (applied.steps, applied.checksum) == (steps, checksum):
                    return applied.state
                problem = f"step {first_step} was sent before, in a chunk of other values"
                raise SequenceStateError(problem, "chunk.first_step")
        replay = f" or again one of the last {len(history)} chunks" if history else ""
        problem = f"{first_step}, the sequence continues at step {self.step}{replay}"
        raise SequenceStateError(problem, "chunk.first_step")


class _CollectedChunk(OpenSequence):
    """A sequence that collects the results of its only chunk.

    Attributes:
        logits: float32 [steps, output_size].
        states: float32 [steps, hidden_size], or [0, hidden_size] if they are not kept.
        done: Done when the chunk is.
    """

    __slots__ = ("done", "logits", "states")

    def __init__(self, engine: AsyncEngine, model: Model, state: State | None, steps: int, keep_states: bool) -> None:
        super().__init__(engine, model, 0, state)
        self.logits = np.empty((steps, model.spec.output_size), np.float32)
        self.states = np.empty((steps if keep_states else 0, model.spec.hidden_size), np.float32)
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def on_steps(self, first_step: int, logits: Float32Array, states: Float32Array) -> None:
        # Copied: a view would keep the whole tick.
        end = first_step + len(logits)
        self.logits[first_step:end] = logits
        if len(self.states):
            self.states[first_step:end] = states

    def on_pause(self) -> None:
        self.resume()

    def on_end(self, error: RequestError | None) -> None:
        if self.done.done():  # the caller has left
            return
        if error:
            self.done.set_exception(error)
        else:
            self.done.set_result(None)


async def run_chunk(
    engine: AsyncEngine,
    model: Model,
    values: Float32Array,
    state: State | None,
    deadline: float,
    keep_states: bool = True,
) -> tuple[Float32Array, Float32Array, State]:
    """Computes the steps of a chunk; a cancellation drops the remaining steps.

    Args:
        engine: Runs the chunk.
        model: The model version.
        values: [steps, input_size], 1 step or more.
        state: State before the first step, [num_layers, hidden_size] each; None for the zero state.
        deadline: Seconds on the engine's clock.
        keep_states: True to return the states after all steps.

    Returns:
        Logits [steps, output_size], states [steps, hidden_size] or [0, hidden_size], and the state after the last step.

    Raises:
        OverloadedError: the engine's queue is full.
        ExpiredError: the deadline passed.
        InternalError: the runtime failed.
    """
    sequence = _CollectedChunk(engine, model, state, len(values), keep_states)
    sequence.start(0, values, deadline)
    try:
        await sequence.done
    finally:
        sequence.cancel()
    assert sequence.state is not None
    return sequence.logits, sequence.states, sequence.state
