"""What the engine is asked to do, and how what it computed comes back.

The engine's thread calls `steps_done` and `lane_done`; what they return is handed to `deliver` on the event loop.
"""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from unroll_server.errors import RequestError
from unroll_server.models import Model
from unroll_server.types import Float32Array, State


class Work(ABC):
    """Timesteps of one or more sequences of one model.

    Attributes:
        model: What runs them.
        values: [total_steps, input_size], the sequences end to end; only read.
        offsets: int64 [sequences + 1], where each sequence begins in `values`.
        initial_states: One a sequence; None is the zero state.
        keeps_states: Whether a sequence's state after its last step is wanted.
        interactive: Whether somebody waits for each step: such work goes before bulk, and is told of every tick.
        cancelled: Set by the event loop when the caller has left; the engine then drops what is not yet computed.
    """

    interactive: bool

    def __init__(
        self,
        model: Model,
        values: Float32Array,
        offsets: NDArray[np.int64],
        initial_states: Sequence[State | None],
        keeps_states: bool,
    ) -> None:
        self.model = model
        self.values = values
        self.offsets = offsets
        self.initial_states = initial_states
        self.keeps_states = keeps_states
        self.cancelled = False

    @property
    def size(self) -> int:
        """Sequences."""
        return len(self.offsets) - 1

    @property
    def steps(self) -> int:
        """Timesteps of all sequences."""
        return len(self.values)

    def steps_done(self, position: int, logits: Float32Array, states: Float32Array) -> object | None:
        """Takes what a tick computed for one sequence of interactive work, on the engine's thread.

        Args:
            position: Where in `values` the steps begin.
            logits: [count, output_size], a view that lives until this returns.
            states: [count, hidden_size], a view that lives until this returns.
        """
        return None

    @abstractmethod
    def lane_done(self, index: int, logits: Float32Array, state: State | None) -> object | None:
        """Takes the end of sequence `index`, on the engine's thread.

        Args:
            index: The sequence.
            logits: [output_size] of its last step, a view that lives until this returns.
            state: After its last step, where `keeps_states`; a copy.
        """

    @abstractmethod
    def deliver(self, event: object) -> None:
        """Takes, on the event loop, what `steps_done` or `lane_done` returned."""

    @abstractmethod
    def fail(self, error: RequestError) -> None:
        """Ends the work with an error, on the event loop. Calls after the first do nothing."""


class Batch(Work):
    """Sequences to classify: the logits of each one's last step, answered together.

    Attributes:
        logits: [sequences, output_size], complete once `wait` has returned.
        final_states: One a sequence where `keeps_states`, else all None.
    """

    interactive = False

    def __init__(
        self,
        model: Model,
        values: Float32Array,
        offsets: NDArray[np.int64],
        initial_states: Sequence[State | None],
        keeps_states: bool,
    ) -> None:
        super().__init__(model, values, offsets, initial_states, keeps_states)
        self.logits = np.empty((self.size, model.spec.output_size), np.float32)
        self.final_states: list[State | None] = [None] * self.size
        self._missing = self.size
        self._done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def lane_done(self, index: int, logits: Float32Array, state: State | None) -> object | None:
        """See Work."""
        self.logits[index] = logits
        self.final_states[index] = state
        self._missing -= 1
        return self if self._missing == 0 else None

    def deliver(self, event: object) -> None:
        """See Work."""
        if not self._done.done():
            self._done.set_result(None)

    def fail(self, error: RequestError) -> None:
        """See Work."""
        if not self._done.done():
            self._done.set_exception(error)

    async def wait(self) -> None:
        """Waits until every sequence is answered; raises what it failed with."""
        await self._done


class Progress(NamedTuple):
    """What was computed for consecutive steps of a stretch."""

    offset: int
    """Steps of the stretch before these."""
    steps: int
    states: Float32Array | None
    """[reported, hidden_size], where wanted."""
    logits: Float32Array | None
    """[reported, output_size], where wanted."""


class Stretch(Work):
    """Consecutive steps of one sequence, answered as they are computed.

    Attributes:
        final_state: After the last step, once `progress` has ended.
    """

    interactive = True

    def __init__(
        self,
        model: Model,
        values: Float32Array,
        state: State | None,
        *,
        first_step: int,
        every: int,
        states: bool,
        logits: bool,
    ) -> None:
        """Args as of Work, and what to report.

        Args:
            model: What runs them.
            values: [steps, input_size].
            state: Before the first step.
            first_step: Number of the first step in its sequence.
            every: Reports the steps s with (s + 1) % every == 0.
            states: Whether to report hidden states.
            logits: Whether to report logits.
        """
        offsets = np.array([0, len(values)], np.int64)
        super().__init__(model, values, offsets, [state], keeps_states=True)
        self.final_state: State | None = None
        self._skip = every - 1 - first_step % every
        self._every = every
        self._states = states
        self._logits = logits
        self._events: asyncio.Queue[Progress | RequestError | None] = asyncio.Queue()

    def steps_done(self, position: int, logits: Float32Array, states: Float32Array) -> object | None:
        """See Work."""
        reported = slice((self._skip - position) % self._every, None, self._every)
        return Progress(
            position,
            len(states),
            states[reported].copy() if self._states else None,
            logits[reported].copy() if self._logits else None,
        )

    def lane_done(self, index: int, logits: Float32Array, state: State | None) -> object | None:
        """See Work."""
        self.final_state = state
        return self

    def deliver(self, event: object) -> None:
        """See Work."""
        self._events.put_nowait(event if isinstance(event, Progress) else None)

    def fail(self, error: RequestError) -> None:
        """See Work."""
        self._events.put_nowait(error)

    async def progress(self) -> AsyncGenerator[Progress, None]:
        """Yields what is computed, in order, until every step is; raises what the work failed with."""
        while (event := await self._events.get()) is not None:
            if isinstance(event, RequestError):
                raise event
            yield event
