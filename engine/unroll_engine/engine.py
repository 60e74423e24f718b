"""Engine: one model in this process, without a server.

The server's AsyncEngine drives the same EngineCore, so both give the same bits.
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from unroll_engine.arrays import Ragged, pack_sequences
from unroll_engine.bundle import folder_of, verify_folder
from unroll_engine.core import usable_cores
from unroll_engine.errors import InvalidRequestError
from unroll_engine.jobs import BatchJob
from unroll_engine.models.loader import Loader, Model
from unroll_engine.models.spec import Float32Array, ModelSpec, State
from unroll_engine.readout import check_has_state, no_classes
from unroll_engine.runner import Runner
from unroll_engine.sequence import OpenSequence
from unroll_engine.snapshots import decode_snapshot, encode_snapshot
from unroll_proto.snapshot import Snapshot


@dataclass(frozen=True, slots=True, eq=False)
class Classification:
    """The classes of a batch of sequences, in their order.

    Attributes:
        labels: Most probable class of each sequence.
        label_indices: int64 [n], its index in the model's `class_labels`.
        probabilities: float32 [n, classes].
        logits: float32 [n, output_size], of each sequence's last timestep.
        final_states: The state after each sequence's last timestep; None if not asked for.
    """

    labels: list[str]
    label_indices: NDArray[np.int64]
    probabilities: Float32Array
    logits: Float32Array
    final_states: tuple[Snapshot, ...] | None

    def __len__(self) -> int:
        return len(self.labels)


class Engine:
    """Runs sequences on one model. Its methods can be called from any thread, and the async ones on any event loop.

    Args:
        model: The model; `Engine.load` reads it from a bundle.
        max_lanes: Most sequences in one tick on one thread.
        threads: Threads of the step kernel; None for one per usable core. The bits do not depend on it.
    """

    def __init__(self, model: Model, *, max_lanes: int = 64, threads: int | None = None) -> None:
        if threads is not None and threads < 1:
            raise ValueError(f"threads: 1 or more expected, got {threads}")
        self._model = model
        self._runner = Runner(model, max_lanes, threads or usable_cores())

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        runtime: str = "auto",
        device: str = "cpu",
        max_lanes: int = 64,
        threads: int | None = None,
    ) -> Self:
        """Verifies a bundle and loads it.

        Args:
            path: A bundle; a folder of a model's versions, whose newest is loaded; or a repository of one model.
            runtime: "kernel", "onnx", "torchscript"; or "auto": the step kernel where it can run the model, else onnx.
            device: "cpu" or "cuda".
            max_lanes: Most sequences in one tick on one thread.
            threads: Threads of the step kernel; None for one per usable core.

        Raises:
            BundleError: there is no bundle, or it can't be trusted, loaded or run.
            RuntimeUnavailableError: the runtime or the device can't be used on this machine.
        """
        loader = Loader(runtime, device, max_lanes)
        return cls(loader.load(verify_folder(folder_of(Path(path)))), max_lanes=max_lanes, threads=threads)

    @property
    def spec(self) -> ModelSpec:
        """Sizes, labels and names of the model."""
        return self._model.spec

    @property
    def bitwise(self) -> bool:
        """True if a sequence has the same bits alone, in any batch, and cut into any chunks."""
        return self._model.bitwise

    def classify(
        self,
        sequences: Iterable[ArrayLike] | Ragged,
        *,
        initial_states: Sequence[Snapshot | None] | None = None,
        return_final_states: bool = False,
    ) -> Classification:
        """Classifies sequences by their last timesteps.

        Args:
            sequences: Arrays [steps, input_size] of any lengths, or one array [batch, steps, input_size]; or a Ragged,
                which is not copied.
            initial_states: The state that each sequence begins with; None for the zero state.
            return_final_states: True to return the state after each sequence's last timestep.

        Raises:
            InvalidRequestError: a sequence or a state can't be used; a ValueError, which names it.
            SequenceStateError: a state is of another model; a ValueError, which names it.
        """
        self._check_classes()
        job, begun = self._batch(sequences, initial_states, return_final_states)
        if job.size:
            self._runner.run(job)
        return self._classification(job, begun)

    async def aclassify(
        self,
        sequences: Iterable[ArrayLike] | Ragged,
        *,
        initial_states: Sequence[Snapshot | None] | None = None,
        return_final_states: bool = False,
    ) -> Classification:
        """Classifies on another thread, while the event loop runs on; see `classify`."""
        self._check_classes()
        job, begun = self._batch(sequences, initial_states, return_final_states)
        if job.size:
            await self._runner.arun(job)
        return self._classification(job, begun)

    def last_outputs(self, sequences: Iterable[ArrayLike] | Ragged) -> dict[str, Float32Array]:
        """Computes the outputs of each sequence's last timestep, by name; also of a model without classes.

        Args:
            sequences: See `classify`.

        Returns:
            float32 [n, *shape] each: `logits`, or the outputs of a step model.

        Raises:
            InvalidRequestError: a sequence can't be used; a ValueError, which names it.
        """
        job, _ = self._batch(sequences, None, False)
        if not job.size:
            return self.spec.named_outputs(np.empty((0, self.spec.output_size), np.float32))
        self._runner.run(job)
        job.raise_error()
        return self.spec.named_outputs(job.logits)

    def open(self, snapshot: Snapshot | None = None) -> OpenSequence:
        """Begins a sequence, or resumes one.

        Args:
            snapshot: The state to resume from, of this engine, a client or a server.

        Raises:
            SequenceStateError: it is of another model or version.
            InvalidRequestError: it is damaged, or the model takes whole sequences only.
        """
        check_has_state(self.spec, "model")
        return OpenSequence(self._model, self._runner, snapshot)

    def close(self) -> None:
        """Releases the model, after the jobs that run. Later calls raise RuntimeError."""
        self._runner.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_classes(self) -> None:
        if not self.spec.class_labels:
            raise no_classes(self.spec)

    def _batch(
        self,
        sequences: Iterable[ArrayLike] | Ragged,
        initial_states: Sequence[Snapshot | None] | None,
        keeps_states: bool,
    ) -> tuple[BatchJob, list[int]]:
        """Makes a job of checked sequences, and returns the steps that each has consumed before."""
        if keeps_states or initial_states is not None:
            check_has_state(self.spec, "return_final_states" if keeps_states else "initial_states")
        values, offsets = pack_sequences(sequences, self.spec.input_size)
        count = len(offsets) - 1
        begun = [0] * count
        initial: State | None = None
        if initial_states is not None:
            if len(initial_states) != count:
                raise InvalidRequestError(f"{len(initial_states)} for {count} sequences", "initial_states")
            initial = self.spec.initial_state(count)
            for index, snapshot in enumerate(initial_states):
                if snapshot is not None:
                    begun[index] = snapshot.step
                    field = f"initial_states[{index}]"
                    state = decode_snapshot(snapshot.to_proto(), self.spec, field)
                    for array, value in zip(initial, state, strict=True):
                        array[:, index] = value
        return BatchJob(self._model, values, offsets, initial, keeps_states), begun

    def _classification(self, job: BatchJob, begun: list[int]) -> Classification:
        spec = self.spec
        job.raise_error()
        if not job.size:
            logits = np.empty((0, spec.output_size), np.float32)
            probabilities = np.empty((0, len(spec.class_labels)), np.float32)
            return Classification([], np.empty(0, np.int64), probabilities, logits, () if job.keeps_states else None)
        final_states = None
        if job.final_state is not None:
            steps = np.diff(job.offsets).tolist()
            final_states = tuple(
                Snapshot.from_proto(
                    encode_snapshot(spec, before + count, tuple(array[:, index] for array in job.final_state)),
                    spec.num_layers,
                )
                for index, (before, count) in enumerate(zip(begun, steps, strict=True))
            )
        indices = job.labels.astype(np.int64)
        labels = list(map(spec.class_labels.__getitem__, indices.tolist()))
        return Classification(labels, indices, job.probabilities, job.logits, final_states)
