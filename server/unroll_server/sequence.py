"""One open sequence of a stream: its state between chunks, and the chunks that it can answer again."""

import zlib
from collections import deque
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import NamedTuple

from unroll_server.engine import Engine
from unroll_server.errors import SequenceStateError
from unroll_server.models import Model
from unroll_server.types import Float32Array, State
from unroll_server.work import Progress, Stretch

REPEATABLE = 16
"""Chunks of a sequence that can be answered again: the latest ones."""


class _Applied(NamedTuple):
    first_step: int
    steps: int
    checksum: int
    state: State | None  # before the chunk


class Sequence:
    """A sequence between two chunks. Its methods run one after another.

    Args:
        engine: Runs it.
        model: The model version that it stays on.
        step: Timesteps consumed.
        state: After them; None is the zero state.
        every: Reports the steps s with (s + 1) % every == 0.
        states: Whether to report hidden states.
        logits: Whether to report logits.
    """

    __slots__ = ("_applied", "_engine", "every", "logits", "model", "state", "states", "step")

    def __init__(
        self, engine: Engine, model: Model, step: int, state: State | None, *, every: int, states: bool, logits: bool
    ) -> None:
        self._engine = engine
        self._applied: deque[_Applied] = deque(maxlen=REPEATABLE)
        self.model = model
        self.step = step
        self.state = state
        self.every = every
        self.states = states
        self.logits = logits

    async def run(self, first_step: int, values: Float32Array) -> AsyncGenerator[Progress, None]:
        """Applies a chunk, and yields what is computed as it is.

        A chunk that was applied before is computed again from the state that it began with, so its answer has the
        same bits, and the sequence stays where it is.

        Args:
            first_step: Number of the chunk's first step.
            values: [steps, input_size], 1 step or more.

        Raises:
            SequenceStateError: the chunk is neither the next one nor one of the latest.
        """
        checksum = zlib.crc32(values.data)
        repeats = first_step != self.step
        state = self._state_before(first_step, len(values), checksum) if repeats else self.state
        stretch = Stretch(
            self.model, values, state, first_step=first_step, every=self.every, states=self.states, logits=self.logits
        )
        with self._engine.stream(stretch):
            async with aclosing(stretch.progress()) as parts:
                async for progress in parts:
                    yield progress
        if not repeats:
            self._applied.append(_Applied(first_step, len(values), checksum, state))
            self.state = stretch.final_state
            self.step += len(values)

    def _state_before(self, first_step: int, steps: int, checksum: int) -> State | None:
        for applied in self._applied:
            if applied.first_step == first_step:
                if (applied.steps, applied.checksum) == (steps, checksum):
                    return applied.state
                problem = f"step {first_step} was sent before, in a chunk of other values"
                raise SequenceStateError(problem, "chunk.first_step")
        repeatable = f" or again one of the last {len(self._applied)} chunks" if self._applied else ""
        problem = f"{first_step}, the sequence goes on at step {self.step}{repeatable}"
        raise SequenceStateError(problem, "chunk.first_step")
