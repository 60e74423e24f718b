"""Values that calls return."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from unroll_proto.snapshot import Snapshot
from unroll_proto.v1 import unroll_pb2 as pb


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of one RPC; the client splits larger input.

    Attributes:
        max_sequences: Sequences of one Classify RPC.
        max_steps: Timesteps of one sequence of Classify, or of one chunk of a stream or session.
        max_open_sequences: Sequences open on one stream.
        max_message_bytes: Bytes of one request message.
    """

    max_sequences: int
    max_steps: int
    max_open_sequences: int
    max_message_bytes: int


class Tensor(NamedTuple):
    """A tensor of one sequence.

    Attributes:
        name: Its name.
        dtype: Its number format in the graph, such as "float32".
        shape: Its sizes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """One served model version.

    Attributes:
        name: Model name.
        version: 1 or more.
        architecture: Kind of network, such as "simple_rnn"; "step" for an imported graph of one timestep.
        input_size: Features of one timestep.
        hidden_size: Width of the hidden state of one layer.
        output_size: Logits of one timestep; 1 for a binary model.
        num_layers: Stacked layers.
        class_labels: Class names by index: `output_size` of them, or 2 if that is 1.
        feature_names: Names of the input features.
        runtime: "kernel", "onnx" or "torchscript". Bits are promised of one runtime, not between two.
        runtime_variant: Instruction set that the step kernel uses; empty for other runtimes.
        runtime_note: Reason why the step kernel does not run it; empty if it does, or if another runtime was chosen.
        device: "cpu" or "cuda".
        artifact: File of the bundle that is run.
        max_abs_diff: Largest absolute difference from eager PyTorch that the bundle's proof measured.
        bitwise: True if the same bits are promised alone, batched, chunked, streamed and resumed.
        limits: Limits of one RPC.
        test_accuracy: Share of the test split classified correctly, 0 to 1; None without one.
        inputs: Inputs of a timestep: concatenated, its `input_size` features.
        outputs: Outputs of a timestep: concatenated, its `output_size` logits.
        states: The state, in the order of a snapshot.
        form: Origin of the graph of a step model, "published", "stepped" or "matmul"; empty for other models.
        source_sha256: Checksum of the file that a step model was imported from; empty for other models.
    """

    name: str
    version: int
    architecture: str
    input_size: int
    hidden_size: int
    output_size: int
    num_layers: int
    class_labels: tuple[str, ...]
    feature_names: tuple[str, ...]
    runtime: str
    runtime_note: str
    runtime_variant: str
    device: str
    artifact: str
    max_abs_diff: float
    bitwise: bool
    limits: Limits
    test_accuracy: float | None
    inputs: tuple[Tensor, ...] = ()
    outputs: tuple[Tensor, ...] = ()
    states: tuple[Tensor, ...] = ()
    form: str = ""
    source_sha256: str = ""

    @classmethod
    def from_proto(cls, model: pb.Model) -> ModelInfo:
        """Decodes a message of the wire."""
        return cls(
            name=model.name,
            version=model.version,
            architecture=model.architecture,
            input_size=model.input_size,
            hidden_size=model.hidden_size,
            output_size=model.output_size,
            num_layers=model.num_layers,
            class_labels=tuple(model.class_labels),
            feature_names=tuple(model.feature_names),
            runtime=model.runtime,
            runtime_note=model.runtime_note,
            runtime_variant=model.runtime_variant,
            device=model.device,
            artifact=model.artifact,
            max_abs_diff=model.max_abs_diff,
            bitwise=model.bitwise,
            limits=Limits(
                max_sequences=model.limits.max_sequences,
                max_steps=model.limits.max_steps,
                max_open_sequences=model.limits.max_open_sequences,
                max_message_bytes=model.limits.max_message_bytes,
            ),
            test_accuracy=model.test_accuracy if model.HasField("test_accuracy") else None,
            inputs=_tensors(model.inputs),
            outputs=_tensors(model.outputs),
            states=_tensors(model.states),
            form=model.form,
            source_sha256=model.source_sha256,
        )


def _tensors(messages: Iterable[pb.Tensor]) -> tuple[Tensor, ...]:
    return tuple(Tensor(each.name, each.dtype, tuple(each.shape)) for each in messages)


@dataclass(frozen=True, slots=True, eq=False)
class Classification:
    """The classes of a batch of sequences, in the order in which they were given.

    Attributes:
        labels: Most probable class of each sequence.
        label_indices: int64 [n], its index in the model's `class_labels`.
        probabilities: float32 [n, classes].
        logits: float32 [n, output_size], of each sequence's last timestep.
        final_states: The state after each sequence's last timestep; None if not asked for.
        model: Name of the model that answered.
        version: Its version, the same for all sequences.
    """

    labels: list[str]
    label_indices: NDArray[np.int64]
    probabilities: NDArray[np.float32]
    logits: NDArray[np.float32]
    final_states: tuple[Snapshot, ...] | None
    model: str
    version: int

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, slots=True, eq=False)
class Steps:
    """Results of the timesteps `first_step` to `first_step + count - 1` of a sequence.

    Attributes:
        first_step: Number of the first timestep, counted from 0 at the beginning of the sequence.
        count: Timesteps that were computed.
        steps: int64 [reported], the numbers of those that are reported: every one, or every n-th as asked for.
        states: float32 [reported, hidden_size], the last layer's hidden state after each; None if not asked for.
        logits: float32 [reported, output_size]; None if not asked for. Of a step model, its outputs concatenated.
    """

    first_step: int
    count: int
    steps: NDArray[np.int64]
    states: NDArray[np.float32] | None
    logits: NDArray[np.float32] | None
    _outputs: tuple[Tensor, ...] = field(default=(), repr=False)

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def outputs(self) -> dict[str, NDArray[np.float32]]:
        """The outputs by name, float32 [reported, *shape] each: `logits`, or those of a step model."""
        if self.logits is None:
            return {}
        # A server that does not describe its outputs has no step models.
        return named_outputs(self.logits, self._outputs) if self._outputs else {"logits": self.logits}

    @property
    def probabilities(self) -> NDArray[np.float32] | None:
        """Probabilities of the classes after each step, float32 [reported, classes], from the logits of a classifier.

        They have the bits of `Classification.probabilities`. None without logits.
        """
        if self.logits is None:
            return None
        wide = self.logits.astype(np.float64)
        if wide.shape[1] == 1:
            # Softmax of (0, z) is (1 - sigmoid(z), sigmoid(z)).
            wide = np.concatenate([np.zeros_like(wide), wide], axis=1)
        exponentials = np.exp(wide - wide.max(axis=1, keepdims=True))
        return np.asarray(exponentials / exponentials.sum(axis=1, keepdims=True), np.float32)


def named_outputs(rows: NDArray[np.float32], outputs: Iterable[Tensor]) -> dict[str, NDArray[np.float32]]:
    """Splits the outputs of steps, [steps, output_size], by name."""
    named = {}
    begin = 0
    for name, _, shape in outputs:
        end = begin + math.prod(shape)
        named[name] = rows[:, begin:end].reshape(-1, *shape)
        begin = end
    return named
