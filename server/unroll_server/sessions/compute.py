"""Computes a chunk in the engine, as one awaitable call."""

import asyncio

import numpy as np

from unroll_engine.async_engine import AsyncEngine
from unroll_engine.errors import RequestError
from unroll_engine.jobs import ChunkJob
from unroll_engine.models.loader import Model
from unroll_engine.models.spec import Float32Array, State
from unroll_server import caller
from unroll_server.sequence import PIECE


class _Results:
    """Results of a job; its listener (jobs.Listener)."""

    def __init__(self, logits: Float32Array, states: Float32Array | None) -> None:
        self._logits = logits
        self._states = states
        self._at = 0
        self.done: asyncio.Future[State] = asyncio.get_running_loop().create_future()

    def progressed(self, count: int, logits: Float32Array, states: Float32Array) -> None:
        """See jobs.Listener."""
        # Copied, since a view would keep the results of the whole tick.
        self._logits[self._at : self._at + count] = logits
        if self._states is not None:
            self._states[self._at : self._at + count] = states
        self._at += count

    def finished(self, state: State) -> None:
        """See jobs.Listener."""
        if not self.done.done():
            self.done.set_result(state)

    def failed(self, error: RequestError) -> None:
        """See jobs.Listener."""
        if not self.done.done():
            self.done.set_exception(error)


async def compute(
    engine: AsyncEngine,
    model: Model,
    values: Float32Array,
    state: State | None,
    deadline: float,
    keep_states: bool = True,
) -> tuple[Float32Array, Float32Array, State]:
    """Computes the steps of a chunk. If it is cancelled, the remaining steps are dropped.

    Args:
        engine: Runs the model.
        model: Model of the sequence.
        values: float32 [steps, input_size], 1 step or more.
        state: State before the first step, float32 [num_layers, hidden_size] each; None for zeros.
        deadline: Seconds on the engine's clock.
        keep_states: True to return the states after all steps.

    Returns:
        Logits [steps, output_size], states [steps, hidden_size] (or [0, hidden_size]), and the state after the last
        step, [num_layers, hidden_size] each; all float32.

    Raises:
        OverloadedError: the engine's queue is full.
        ExpiredError: the deadline passed.
        InternalError: the runtime failed.
    """
    logits = np.empty((len(values), model.spec.output_size), np.float32)
    states = np.empty((len(values) if keep_states else 0, model.spec.hidden_size), np.float32)
    call = caller.current.get()
    # In pieces, like the chunks of streams, so that a long chunk gives up its lane to others in between.
    for begin in range(0, len(values), PIECE):
        end = begin + PIECE
        results = _Results(logits[begin:end], states[begin:end] if keep_states else None)
        job = ChunkJob(model, values[begin:end], state, results, deadline, call.identity, call.trace)
        engine.start(job)
        call.steps += job.steps
        try:
            state = await results.done
        finally:
            engine.end(job)
    assert state is not None
    return logits, states, state
