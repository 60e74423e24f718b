"""One chunk of a session on its way through the engine."""

import asyncio

import numpy as np

from unroll_server.engine import Engine
from unroll_server.errors import RequestError
from unroll_server.models import Model
from unroll_server.sequence import PIECE
from unroll_server.types import Float32Array, State
from unroll_server.work import Stretch


class _Piece:
    """Listens to a stretch, and keeps what it computes (work.Listener)."""

    def __init__(self, logits: Float32Array, states: Float32Array | None) -> None:
        self._logits = logits
        self._states = states
        self._at = 0
        self.done: asyncio.Future[State] = asyncio.get_running_loop().create_future()

    def progressed(self, count: int, logits: Float32Array, states: Float32Array) -> None:
        """See work.Listener."""
        # Copied: a view would keep the whole tick.
        self._logits[self._at : self._at + count] = logits
        if self._states is not None:
            self._states[self._at : self._at + count] = states
        self._at += count

    def finished(self, state: State) -> None:
        """See work.Listener."""
        if not self.done.done():
            self.done.set_result(state)

    def failed(self, error: RequestError) -> None:
        """See work.Listener."""
        if not self.done.done():
            self.done.set_exception(error)


async def compute(
    engine: Engine, model: Model, values: Float32Array, state: State | None, deadline: float, keep_states: bool = True
) -> tuple[Float32Array, Float32Array, State]:
    """Computes the steps of a chunk; when cancelled, what is not computed yet never is.

    Args:
        engine: What runs it.
        model: The model version.
        values: [steps, input_size], 1 step or more.
        state: Before the first step, [num_layers, hidden_size] each; None is the zero state.
        deadline: On the engine's clock, in seconds.
        keep_states: Whether the states after all steps are wanted.

    Returns:
        Logits [steps, output_size], states [steps, hidden_size] or none of them, and the state after the last step.

    Raises:
        OverloadedError: the engine's queue is full.
        ExpiredError: the deadline passed.
        InternalError: the runtime failed.
    """
    logits = np.empty((len(values), model.spec.output_size), np.float32)
    states = np.empty((len(values) if keep_states else 0, model.spec.hidden_size), np.float32)
    # In pieces as a stream's chunks are, so that a long one lets others take its lane.
    for begin in range(0, len(values), PIECE):
        end = begin + PIECE
        piece = _Piece(logits[begin:end], states[begin:end] if keep_states else None)
        stretch = Stretch(model, values[begin:end], state, piece)
        stretch.deadline = deadline
        engine.start(stretch)
        try:
            state = await piece.done
        finally:
            engine.end(stretch)
    assert state is not None
    return logits, states, state
