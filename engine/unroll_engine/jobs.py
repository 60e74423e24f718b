"""What the engine is asked to do, and how what it computed comes back.

Whoever runs a tick tells a batch of its lanes' ends (`lanes_done`) and a stretch of its steps (`steps_done`, `ended`);
what these return is handed to `deliver` on the event loop.
"""

import asyncio
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from unroll_engine.errors import InvalidRequestError, RequestError
from unroll_engine.models.loader import Model
from unroll_engine.models.spec import Float32Array, State
from unroll_engine.observer import ObservedCall
from unroll_engine.readout import classify


class Job(ABC):
    """Timesteps of one or more sequences of one model.

    Attributes:
        model: What runs them.
        values: [total_steps, input_size], the sequences end to end; only read.
        offsets: int64 [sequences + 1], where each sequence begins in `values`.
        initial_state: [num_layers, sequences, hidden_size] each, before the first steps; None is the zero state.
        keeps_states: Whether a sequence's state after its last step is wanted.
        deadline: On the engine's clock, in seconds: work that is still queued then is dropped; infinite where none.
        interactive: Whether somebody waits for each step: such work goes before bulk, and is told of every tick.
        cancelled: Set by the event loop when the caller has left; the engine then drops what is not yet computed.
        over: Set by the event loop when the work is answered or has failed.
        taken: Sequences that have left the queue.
        arrived: On the engine's clock, when it was queued; 0 before.
        owner: Identity of the caller whose share it counts for.
        bytes: Of values and initial state.
        due: See admission.py, which keeps it here.
        waited: Seconds from its arrival to its first tick.
        call: Whose it is, where more is told of that than figures.
    """

    __slots__ = (
        "arrived",
        "bytes",
        "call",
        "cancelled",
        "deadline",
        "due",
        "initial_state",
        "keeps_states",
        "model",
        "offsets",
        "over",
        "owner",
        "taken",
        "values",
        "waited",
    )
    interactive: bool

    def __init__(
        self,
        model: Model,
        values: Float32Array,
        offsets: NDArray[np.int64],
        initial_state: State | None,
        keeps_states: bool,
        deadline: float,
        owner: str = "",
        call: ObservedCall | None = None,
    ) -> None:
        self.model = model
        self.values = values
        self.offsets = offsets
        self.initial_state = initial_state
        self.keeps_states = keeps_states
        self.deadline = deadline
        self.cancelled = False
        self.over = False
        self.taken = 0
        self.arrived = 0.0
        self.owner = owner
        self.bytes = values.nbytes + sum(array.nbytes for array in initial_state or ())
        self.due = 0
        self.waited = 0.0
        self.call = call

    @property
    def size(self) -> int:
        """Sequences."""
        return len(self.offsets) - 1

    @property
    def steps(self) -> int:
        """Timesteps of all sequences."""
        return len(self.values)

    @abstractmethod
    def deliver(self, event: object) -> None:
        """Takes, on the event loop, what whoever ran a tick was given to hand over."""

    @abstractmethod
    def fail(self, error: RequestError) -> None:
        """Ends the work with an error, on the event loop. Calls after the first do nothing."""


Emit = Callable[[Job, object], None]
"""Takes something that a work has to deliver."""


class BatchJob(Job):
    """Sequences to classify: what each one's last step says, answered together.

    Attributes:
        logits: [sequences, output_size]; this and the following are complete once `wait` has returned.
        probabilities: [sequences, classes].
        labels: [sequences], the index of the most probable class.
        final_state: [num_layers, sequences, hidden_size] each where `keeps_states`, else None.
    """

    __slots__ = ("_done", "_missing", "final_state", "labels", "logits", "probabilities")
    interactive = False

    def __init__(
        self,
        model: Model,
        values: Float32Array,
        offsets: NDArray[np.int64],
        initial_state: State | None = None,
        keeps_states: bool = False,
        deadline: float = math.inf,
        owner: str = "",
        call: ObservedCall | None = None,
    ) -> None:
        super().__init__(model, values, offsets, initial_state, keeps_states, deadline, owner, call)
        self.logits: Float32Array
        self.probabilities: Float32Array
        self.labels: NDArray[np.intp]
        self.final_state: State | None = None
        self._missing = len(offsets) - 1
        self._done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def lanes_done(self, indices: NDArray[np.int64], logits: Float32Array, state: State | None) -> bool:
        """Takes the ends of sequences.

        Args:
            indices: The sequences, int64 [count].
            logits: Of their last steps, [count, output_size].
            state: After them, [num_layers, count, hidden_size] each, where `keeps_states`.

        Returns:
            Whether none is missing. `probabilities` and `labels` are still to be set then.
        """
        size = self.size
        if size == 1:
            self.logits, self.final_state = logits, state
            return True
        if self._missing == size:
            self.logits = np.empty((size, logits.shape[1]), np.float32)
            self.final_state = self.model.spec.zero_state(size) if self.keeps_states else None
        self.logits[indices] = logits
        for kept, value in zip(self.final_state or (), state or (), strict=True):
            kept[:, indices] = value
        self._missing -= len(indices)
        return not self._missing

    def deliver(self, event: object) -> None:
        """See Job."""
        # A state that is no number makes every logit none.
        lost = np.isnan(self.logits[:, 0])
        if lost.any():
            self.fail(_too_large(self.model, f"of sequence {lost.argmax()} "))
            return
        self.over = True
        if not self._done.done():
            self._done.set_result(None)

    def fail(self, error: RequestError) -> None:
        """See Job."""
        self.over = True
        if not self._done.done():
            self._done.set_exception(error)

    async def wait(self) -> None:
        """Waits until every sequence is answered; raises what it failed with."""
        await self._done


def complete(batches: Sequence[BatchJob]) -> None:
    """Sets `probabilities` and `labels` of batches whose logits are all there, in one go: a row alone costs as much."""
    if not batches:
        return
    logits = batches[0].logits if len(batches) == 1 else np.concatenate([batch.logits for batch in batches])
    probabilities, labels = classify(logits)
    begin = 0
    for batch in batches:
        rows = slice(begin, begin + batch.size)
        begin = rows.stop
        batch.probabilities = probabilities[rows]
        batch.labels = labels[rows]


class Listener(Protocol):
    """Who hears how a stretch gets on, on the event loop."""

    def progressed(self, count: int, logits: Float32Array, states: Float32Array) -> None:
        """The next `count` steps are computed: logits [count, output_size], states [count, hidden_size], views."""
        ...

    def finished(self, state: State) -> None:
        """All steps are computed: the state after the last one, [num_layers, hidden_size] each."""
        ...

    def failed(self, error: RequestError) -> None:
        """The stretch failed; no more will be heard of it."""
        ...


class ChunkJob(Job):
    """Consecutive steps of one sequence, reported as they are computed."""

    __slots__ = ("_listener",)
    interactive = True

    def __init__(
        self,
        model: Model,
        values: Float32Array,
        state: State | None,
        listener: Listener,
        deadline: float = math.inf,
        owner: str = "",
        call: ObservedCall | None = None,
    ) -> None:
        """Args as of Job.

        Args:
            model: What runs them.
            values: [steps, input_size], 1 step or more.
            state: Before the first step, [num_layers, hidden_size] each.
            listener: Who is told.
            deadline: On the engine's clock, in seconds.
            owner: Identity of the caller.
            call: The call to report to, if it is logged or traced.
        """
        initial = None if state is None else tuple([array[:, np.newaxis] for array in state])
        super().__init__(model, values, span(len(values)), initial, True, deadline, owner, call)
        self._listener = listener

    def steps_done(self, logits: Float32Array, states: Float32Array) -> object:
        """Takes what a tick computed for the next steps.

        Args:
            logits: [count, output_size], a view of the tick's result, which is written to by nobody.
            states: [count, hidden_size], likewise.
        """
        return logits, states

    def ended(self, state: State) -> object:
        """Takes the state after the last step, [num_layers, hidden_size] each."""
        # Copied: the sequence keeps it, and must not keep the whole tick with it.
        return [array.copy() for array in state]

    def deliver(self, event: object) -> None:
        """See Job."""
        if isinstance(event, tuple):
            logits, states = event
            # As in BatchJob; once lost, a state stays so.
            if logits[-1, 0] != logits[-1, 0]:
                self._listener.failed(_too_large(self.model, ""))
                return
            self._listener.progressed(len(states), logits, states)
        elif isinstance(event, list):
            self.over = True
            self._listener.finished(tuple(event))

    def fail(self, error: RequestError) -> None:
        """See Job."""
        if not self.over:
            self.over = True
            self._listener.failed(error)


def _too_large(model: Model, whose: str) -> RequestError:
    """Finite values, of which the model's arithmetic makes infinite ones, and of these what is no number."""
    return InvalidRequestError(f"values {whose}are so large that the state of {model.spec.key} is not finite", "values")


@lru_cache(1024)
def span(steps: int) -> NDArray[np.int64]:
    """The offsets of one sequence: 0 and `steps`. Not to be written to."""
    offsets = np.array((0, steps), np.int64)
    offsets.flags.writeable = False
    return offsets
