"""Jobs of the engine, and how their results come back.

A tick writes results into batches and makes a `Progress` of each chunk. It collects them as events, which a driver
passes to `deliver` or `fail` where the caller waits: in its thread, or on its event loop.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import ClassVar, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from unroll_engine.errors import InvalidRequestError, RequestError
from unroll_engine.models.loader import Model
from unroll_engine.models.spec import Float32Array, State
from unroll_engine.observer import Trace
from unroll_engine.readout import classify


@dataclass(slots=True, eq=False, repr=False)
class _Job:
    """Timesteps of one or more sequences of one model.

    Attributes:
        model: The model to run them on.
        values: float32 [total_steps, input_size], the sequences concatenated; never written to.
        offsets: int64 [sequences + 1], where each sequence begins in `values`.
        initial_state: [num_layers, sequences, hidden_size] each, before the first steps; None is the zero state.
        keeps_states: True if each sequence's state after its last step is wanted.
        deadline: In seconds of time.monotonic: a job still queued then is dropped; infinite for none.
        owner: Identity of the caller, whose quota it counts for.
        trace: The trace of its call; None if the call is not traced.
        waited: Seconds that its call waited before there was a job; from its first tick on, to that tick.
        interactive: True if the caller waits for each step. Such jobs go before bulk and report every tick.
        cancelled: Set by the driver if the caller left; the rest of the work is dropped.
        over: Set by the driver when the job is answered or has failed.
        taken: Sequences that have left the queue.
        arrived: In seconds of time.monotonic, when it was queued; 0 before.
        due: The deadline in the units of admission.py, which keeps it here.
        bytes: Size of values and initial state.
        size: Number of sequences.
        steps: Timesteps of all sequences.
    """

    interactive: ClassVar[bool]
    model: Model
    values: Float32Array
    offsets: NDArray[np.int64]
    initial_state: State | None = None
    keeps_states: bool = False
    deadline: float = math.inf
    owner: str = ""
    trace: Trace | None = None
    waited: float = 0.0
    cancelled: bool = field(default=False, init=False)
    over: bool = field(default=False, init=False)
    taken: int = field(default=0, init=False)
    arrived: float = field(default=0.0, init=False)
    due: int = field(default=0, init=False)
    bytes: int = field(init=False)
    size: int = field(init=False)
    steps: int = field(init=False)

    def __post_init__(self) -> None:
        self.bytes = self.values.nbytes
        if self.initial_state:
            self.bytes += sum(array.nbytes for array in self.initial_state)
        self.size = len(self.offsets) - 1
        self.steps = len(self.values)


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

    def make_results(self) -> None:
        """Allocates the results, before the first sequence begins."""
        self.logits = np.empty((self.size, self.model.spec.output_size), np.float32)
        self.final_state = self.model.spec.initial_state(self.size) if self.keeps_states else None

    def sequences_done(self, count: int) -> bool:
        """Records that further sequences ended and their results are written.

        Returns:
            True if no sequence is missing. `probabilities` and `labels` are still to be set then.
        """
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
    """Short chunks of several sequences, whose steps and states are reported together.

    Attributes:
        logits: float32 [total_steps, output_size]; this and the following are complete when the job is over.
        states: float32 [total_steps, hidden_size], the last layer's.
        lost: Indices of the sequences whose state is not finite after their steps; `not_finite` is their error.
    """

    interactive = True
    states: Float32Array
    lost: Sequence[int] = ()

    def make_results(self) -> None:
        """See BatchJob."""
        spec = self.model.spec
        self.logits = np.empty((self.steps, spec.output_size), np.float32)
        self.states = np.empty((self.steps, spec.hidden_size), np.float32)
        self.final_state = spec.initial_state(self.size)

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


class Progress(NamedTuple):
    """The steps of a ChunkJob that a tick computed.

    Attributes:
        logits: [count, output_size], a view of the tick's result, which is never written to.
        states: [count, hidden_size], likewise.
        final: The state after the job's last step, [num_layers, hidden_size] each; None if steps are left.
    """

    logits: Float32Array
    states: Float32Array
    final: State | None


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

    def deliver(self, event: object) -> None:
        """Passes a Progress to the listener."""
        assert isinstance(event, Progress)
        # As in BatchJob: a state with a NaN keeps it.
        if event.logits[-1, 0] != event.logits[-1, 0]:
            # The job is not over: the driver cancels the rest when the listener ends it.
            self._listener.failed(_not_finite(self.model, ""))
            return
        self._listener.progressed(len(event.states), event.logits, event.states)
        if event.final is None or self.cancelled:
            return
        # The outputs of a graph from elsewhere need not show what its state holds.
        if self.model.spec.step and not all(np.isfinite(array).all() for array in event.final):
            self._listener.failed(_not_finite(self.model, ""))
            return
        self.over = True
        self._listener.finished(event.final)

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
