"""Jobs of the engine, and how their results come back.

A tick hands a batch the ends of its lanes (`lanes_done`) and a chunk its steps (`steps_done`, `ended`). It collects
events, which a driver passes to `deliver` or `fail` where the caller waits: in its thread, or on its event loop.
"""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from unroll_engine.errors import InvalidRequestError, RequestError
from unroll_engine.models.loader import Model
from unroll_engine.models.spec import Float32Array, State
from unroll_engine.observer import Trace
from unroll_engine.readout import classify


class _Job:
    """Timesteps of one or more sequences of one model.

    Attributes:
        model: The model to run them on.
        values: float32 [total_steps, input_size], the sequences concatenated; never written to.
        offsets: int64 [sequences + 1], where each sequence begins in `values`.
        initial_state: [num_layers, sequences, hidden_size] each, before the first steps; None is the zero state.
        keeps_states: True if each sequence's state after its last step is wanted.
        deadline: In seconds of time.monotonic: a job still queued then is dropped; infinite for none.
        interactive: True if the caller waits for each step. Such jobs go before bulk and report every tick.
        cancelled: Set by the driver if the caller left; the rest of the work is dropped.
        over: Set by the driver when the job is answered or has failed.
        taken: Sequences that have left the queue.
        arrived: In seconds of time.monotonic, when it was queued; 0 before.
        owner: Identity of the caller, whose quota it counts for.
        bytes: Size of values and initial state.
        due: The deadline in the units of admission.py, which keeps it here.
        waited: Seconds from its arrival to its first tick.
        size: Number of sequences.
        steps: Timesteps of all sequences.
        trace: The trace of its call; None if the call is not traced.
    """

    __slots__ = (
        "arrived",
        "bytes",
        "cancelled",
        "deadline",
        "due",
        "initial_state",
        "keeps_states",
        "model",
        "offsets",
        "over",
        "owner",
        "size",
        "steps",
        "taken",
        "trace",
        "values",
        "waited",
    )
    interactive: bool

    def __init__(
        self,
        model: Model,
        values: Float32Array,
        offsets: NDArray[np.int64],
        initial_state: State | None = None,
        keeps_states: bool = False,
        deadline: float = math.inf,
        owner: str = "",
        trace: Trace | None = None,
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
        self.bytes = values.nbytes
        if initial_state:
            self.bytes += sum(array.nbytes for array in initial_state)
        self.due = 0
        self.waited = 0.0
        self.size = len(offsets) - 1
        self.steps = len(values)
        self.trace = trace


class BatchJob(_Job):
    """Sequences to classify by their last steps, answered together.

    Attributes:
        on_end: Called once with None when the job is over. Who sets it deletes it then: it may refer to the job.
        error: Error that it failed with; None if it did not fail.
        logits: float32 [sequences, output_size]; this and the following are complete when the job is over.
        probabilities: float32 [sequences, classes].
        labels: [sequences], index of the most probable class.
        final_state: [num_layers, sequences, hidden_size] each if `keeps_states`, else None.
    """

    interactive = False
    # Defaults are on the class, so that making a job is one call.
    on_end: Callable[[None], object] = staticmethod(lambda _: None)
    error: RequestError | None = None
    logits: Float32Array
    probabilities: Float32Array
    labels: NDArray[np.intp]
    final_state: State | None = None
    _done = 0

    def lanes_done(self, indices: NDArray[np.int64], logits: Float32Array, state: State | None) -> bool:
        """Receives the results of sequences that ended.

        Args:
            indices: The sequences, int64 [count].
            logits: [count, output_size], logits of their last steps.
            state: [num_layers, count, hidden_size] each, the state after them; used if `keeps_states`.

        Returns:
            True if no sequence is missing. `probabilities` and `labels` are still to be set then.
        """
        size = self.size
        if size == 1:
            self.logits, self.final_state = logits, state
            return True
        if not self._done:
            self.logits = np.empty((size, logits.shape[1]), np.float32)
            self.final_state = self.model.spec.initial_state(size) if self.keeps_states else None
        self.logits[indices] = logits
        for kept, value in zip(self.final_state or (), state or (), strict=True):
            kept[:, indices] = value
        self._done += len(indices)
        return self._done == size

    def make_results(self) -> None:
        """Allocates `logits` and `final_state` for a runtime that writes into them itself."""
        self.logits = np.empty((self.size, self.model.spec.output_size), np.float32)
        self.final_state = self.model.spec.initial_state(self.size) if self.keeps_states else None

    def sequences_done(self, count: int) -> bool:
        """Records that further sequences ended and their results are written; returns as `lanes_done`."""
        self._done += count
        return self._done == self.size

    def deliver(self, event: object) -> None:
        """Ends the job: all lanes are done."""
        # A state with a NaN makes every logit NaN.
        lost = np.isnan(self.logits[:, 0]).tobytes().find(True)
        if lost >= 0:
            error = _not_finite(self.model, f"of sequence {lost} ")
            error.sequence = lost
            self.fail(error)
            return
        self.over = True
        self.on_end(None)

    def fail(self, error: RequestError) -> None:
        """Ends the job with an error; ignored if it is over."""
        if not self.over:
            self.over = True
            self.error = error
            self.on_end(None)

    def raise_error(self) -> None:
        """Raises the error that the job failed with, if any."""
        error, self.error = self.error, None
        if error:
            try:
                raise error
            finally:
                # Its traceback has this frame: a cycle would keep values and model until a garbage collection.
                del error


class StepsJob(BatchJob):
    """Short chunks of several sequences, whose steps are reported together.

    Attributes:
        logits: float32 [total_steps, output_size]; this and the following are complete when the job is over.
        states: float32 [total_steps, hidden_size], the last layer's.
        lost: Indices of the sequences whose state is not finite after their steps; `not_finite` is their error.
    """

    interactive = True
    states: Float32Array
    lost: Sequence[int] = ()

    def __init__(
        self,
        model: Model,
        values: Float32Array,
        offsets: NDArray[np.int64],
        initial_state: State,
        owner: str = "",
        trace: Trace | None = None,
    ) -> None:
        super().__init__(model, values, offsets, initial_state, True, math.inf, owner, trace)

    def make_results(self) -> None:
        """See BatchJob."""
        spec = self.model.spec
        self.logits = np.empty((self.steps, spec.output_size), np.float32)
        self.states = np.empty((self.steps, spec.hidden_size), np.float32)
        self.final_state = spec.initial_state(self.size)

    def lanes_done(self, indices: NDArray[np.int64], logits: Float32Array, state: State | None) -> bool:
        """See BatchJob; the logits of all steps are written already."""
        for kept, value in zip(self.final_state or (), state or (), strict=True):
            kept[:, indices] = value
        return self.sequences_done(len(indices))

    def deliver(self, event: object) -> None:
        """Ends the job: all steps are done."""
        lost = np.isnan(self.logits[self.offsets[1:] - 1, 0])
        if self.model.spec.step:
            # The outputs of a graph from elsewhere need not show what its state holds.
            for array in self.final_state or ():
                lost |= ~np.isfinite(array).all(axis=(0, 2))
        self.lost = np.flatnonzero(lost).tolist()
        self.over = True
        self.on_end(None)

    def not_finite(self) -> RequestError:
        """Returns the error of a sequence of `lost`."""
        return _not_finite(self.model, "")


def complete(batches: Sequence[BatchJob]) -> None:
    """Sets `probabilities` and `labels` of batches of one model that have all logits.

    In one pass, since one row costs as much as many.
    """
    if not batches:
        return
    logits = batches[0].logits if len(batches) == 1 else np.concatenate([batch.logits for batch in batches])
    probabilities, labels = classify(logits, batches[0].model.spec.step)
    begin = 0
    for batch in batches:
        rows = slice(begin, begin + batch.size)
        begin = rows.stop
        batch.probabilities = probabilities[rows]
        batch.labels = labels[rows]


class Listener(Protocol):
    """Receives the results of a ChunkJob as they are computed."""

    def progressed(self, count: int, logits: Float32Array, states: Float32Array) -> None:
        """Receives the next `count` steps: logits [count, output_size], states [count, hidden_size], as views."""
        ...

    def finished(self, state: State) -> None:
        """Receives the state after the last step, [num_layers, hidden_size] each."""
        ...

    def failed(self, error: RequestError) -> None:
        """Receives the error that ended the job; nothing follows."""
        ...


class ChunkJob(_Job):
    """Consecutive steps of one sequence, reported as they are computed.

    Args:
        model: The model to run them on.
        values: float32 [steps, input_size], 1 step or more.
        state: [num_layers, hidden_size] each, the state before the first step; None for the zero state.
        listener: Receives the results.
        deadline: See Job.
        owner: See Job.
        trace: See Job.
    """

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
        trace: Trace | None = None,
    ) -> None:
        initial = None if state is None else tuple([array[:, np.newaxis] for array in state])
        super().__init__(model, values, span(len(values)), initial, True, deadline, owner, trace)
        self._listener = listener

    def steps_done(self, logits: Float32Array, states: Float32Array) -> object:
        """Makes an event of a tick's next steps.

        Args:
            logits: [count, output_size], a view of the tick's result, which is never written to.
            states: [count, hidden_size], likewise.
        """
        return logits, states

    def ended(self, state: State) -> object:
        """Makes an event of the state after the last step, [num_layers, hidden_size] each."""
        # Copied: a view would keep the whole tick in memory.
        return [array.copy() for array in state]

    def deliver(self, event: object) -> None:
        """Passes an event of `steps_done` or `ended` to the listener."""
        if isinstance(event, tuple):
            logits, states = event
            # As in BatchJob: a state with a NaN keeps it.
            if logits[-1, 0] != logits[-1, 0]:
                # The job is not over: the driver cancels the rest when the listener ends it.
                self._listener.failed(_not_finite(self.model, ""))
                return
            self._listener.progressed(len(states), logits, states)
        elif isinstance(event, list):
            # The outputs of a graph from elsewhere need not show what its state holds.
            if self.model.spec.step and not all(np.isfinite(array).all() for array in event):
                self._listener.failed(_not_finite(self.model, ""))
                return
            self.over = True
            self._listener.finished(tuple(event))

    def fail(self, error: RequestError) -> None:
        """Ends the job with an error; ignored if it is over."""
        if not self.over:
            self.over = True
            self._listener.failed(error)


Job = BatchJob | ChunkJob

Emit = Callable[[tuple[Job, object]], None]
"""Collects an event for a job: a list's append."""


def _not_finite(model: Model, whose: str) -> RequestError:
    """Makes the error for finite values that overflow in the model's arithmetic, or that a step model can't take."""
    if model.spec.step:
        return InvalidRequestError(
            f"{model.spec.key} can't compute values {whose}(too large, or not an index)", "values"
        )
    return InvalidRequestError(f"values {whose}are so large that the state of {model.spec.key} is not finite", "values")


@lru_cache(1024)
def span(steps: int) -> NDArray[np.int64]:
    """Returns the offsets of one sequence, 0 and `steps`; read-only."""
    offsets = np.array((0, steps), np.int64)
    offsets.flags.writeable = False
    return offsets
