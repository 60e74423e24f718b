"""A sequence in this process, advanced chunk by chunk."""

import threading
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from unroll_engine.arrays import check_sequence
from unroll_engine.errors import RequestError, SequenceStateError
from unroll_engine.jobs import ChunkJob
from unroll_engine.models.loader import Model
from unroll_engine.models.spec import Float32Array, State
from unroll_engine.runner import Runner
from unroll_engine.snapshots import decode_snapshot, encode_snapshot
from unroll_proto.snapshot import Snapshot


@dataclass(frozen=True, slots=True, eq=False)
class Steps:
    """The results of consecutive timesteps of a sequence.

    Attributes:
        first_step: Number of the first timestep, counted from 0 at the beginning of the sequence.
        states: float32 [steps, hidden_size], the last layer's hidden state after each; of a step model [steps, 0].
        logits: float32 [steps, output_size]; of a step model, its outputs concatenated.
        outputs: Outputs by name, float32 [steps, *shape] each: `logits`, or those of a step model.
    """

    first_step: int
    states: Float32Array
    logits: Float32Array
    outputs: dict[str, Float32Array]

    def __len__(self) -> int:
        return len(self.logits)


class OpenSequence:
    """A sequence between its timesteps, which costs only its state; made by `Engine.open`.

    Attributes:
        step: Timesteps consumed.
    """

    __slots__ = ("_busy", "_model", "_runner", "_state", "step")

    def __init__(self, model: Model, runner: Runner, snapshot: Snapshot | None) -> None:
        self.step = snapshot.step if snapshot else 0
        self._model = model
        self._runner = runner
        self._state = decode_snapshot(snapshot.to_proto(), model.spec, "snapshot") if snapshot else None
        self._busy = threading.Lock()

    def advance(self, chunk: ArrayLike) -> Steps:
        """Computes the next timesteps.

        Args:
            chunk: [steps, input_size], 1 step or more.

        Raises:
            InvalidRequestError: the chunk can't be used; the sequence is as it was.
            SequenceStateError: another thread or task advances the sequence.
        """
        collector = self._begin(chunk)
        try:
            self._runner.run(collector.job)
            return self._end(collector)
        finally:
            self._busy.release()

    async def aadvance(self, chunk: ArrayLike) -> Steps:
        """Computes the next timesteps on another thread, while the event loop runs on; see `advance`."""
        collector = self._begin(chunk)
        try:
            await self._runner.arun(collector.job)
            return self._end(collector)
        finally:
            self._busy.release()

    def snapshot(self) -> Snapshot:
        """Returns the state after the last timestep: a value to keep, to send to a server, and to resume from."""
        spec = self._model.spec
        return Snapshot.from_proto(encode_snapshot(spec, self.step, self._state), spec.num_layers)

    def _begin(self, chunk: ArrayLike) -> "_Collector":
        values = check_sequence(chunk, self._model.spec.input_size, "chunk")
        if not self._busy.acquire(blocking=False):
            raise SequenceStateError("the sequence is being advanced: wait for the answer first")
        return _Collector(self._model, values, self._state)

    def _end(self, collector: "_Collector") -> Steps:
        state, logits, states = collector.result()
        steps = Steps(self.step, states, logits, self._model.spec.named_outputs(logits))
        self._state = state
        self.step += len(states)
        return steps


class _Collector:
    """Collects the steps of a chunk (jobs.Listener)."""

    def __init__(self, model: Model, values: Float32Array, state: State | None) -> None:
        self.job = ChunkJob(model, values, state, self)
        self._logits: list[Float32Array] = []
        self._states: list[Float32Array] = []
        self._state: State | None = None
        self._error: RequestError | None = None

    def progressed(self, count: int, logits: Float32Array, states: Float32Array) -> None:
        """See jobs.Listener."""
        self._logits.append(logits)
        self._states.append(states)

    def finished(self, state: State) -> None:
        """See jobs.Listener."""
        self._state = state

    def failed(self, error: RequestError) -> None:
        """See jobs.Listener."""
        self._error = error
        self.job.cancelled = True

    def result(self) -> tuple[State, Float32Array, Float32Array]:
        """Returns the final state, logits and states of all steps, copied out of the ticks; raises the job's error."""
        if self._error:
            raise self._error
        assert self._state is not None
        return self._state, np.concatenate(self._logits), np.concatenate(self._states)
