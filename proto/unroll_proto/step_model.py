"""Step models: the tensors of a graph of one timestep, or of whole sequences, as the manifest describes them."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from unroll_proto.v1 import bundle_pb2 as pb

ARCHITECTURE = "step"
FORMS = ("published", "stepped", "matmul")
WHOLE = "whole"
"""Architecture and form of a graph of whole sequences."""
BATCH = "batch"
"""The dimension that holds the sequences."""
TIME = "time"
"""The dimension that holds the timesteps of a whole sequence."""

STATE_DTYPES = ("float32", "float64", "int32", "int64")
INPUT_DTYPES = STATE_DTYPES
OUTPUT_DTYPES = (*STATE_DTYPES, "bool")

MAX_STATE_BYTES = 16 * 2**20
"""Largest state of one sequence in bytes."""
MAX_TENSORS = 1024
"""Inputs, outputs and state tensors, at most of each."""
MAX_NAME_BYTES = 1024


class StepTensor(NamedTuple):
    """A tensor that goes into a graph of one timestep, or comes out of it.

    Attributes:
        name: Its name in the graph.
        dtype: Its number format.
        before: Dimensions before the batch.
        after: Dimensions after the batch; all of them if there is no batch.
        batched: True if it has a dimension for the batch.
    """

    name: str
    dtype: np.dtype[Any]
    before: tuple[int, ...]
    after: tuple[int, ...]
    batched: bool

    @property
    def dims(self) -> tuple[int, ...]:
        """Dimensions of one sequence, without the batch."""
        return self.before + self.after

    @property
    def size(self) -> int:
        """Values of one sequence."""
        return math.prod(self.dims)

    @property
    def nbytes(self) -> int:
        """Bytes of one sequence."""
        return self.size * self.dtype.itemsize

    def batch_dims(self, lanes: int) -> tuple[int, ...]:
        """Dimensions of a batch of `lanes` sequences."""
        return (*self.before, lanes, *self.after) if self.batched else self.dims


def tensor_of(spec: pb.TensorSpec) -> StepTensor:
    """Reads the description of a tensor; of a whole sequence, its values of one timestep.

    Raises:
        ValueError: it is not one that a step model can have.
    """
    size = len(spec.name.encode())
    _require(0 < size <= MAX_NAME_BYTES, f"a name of {size} bytes, 1 to {MAX_NAME_BYTES} expected")
    _require(spec.dtype in OUTPUT_DTYPES, f"{spec.name!r}: dtype {spec.dtype!r}, one of {', '.join(OUTPUT_DTYPES)}")
    shape = [each for each in spec.shape if each != TIME]
    _require(shape.count(BATCH) <= 1 and len(shape) <= 16, f"{spec.name!r}: shape {shape}")
    known = [each for each in shape if each != BATCH]
    right = all(each.isascii() and each.isdigit() and len(each) < 9 and int(each) for each in known)
    _require(right, f"{spec.name!r}: shape {shape}, sizes of 1 or more, or {BATCH!r}, expected")
    dims = tuple(map(int, known))
    axis = shape.index(BATCH) if BATCH in shape else 0
    return StepTensor(spec.name, np.dtype(spec.dtype), dims[:axis], dims[axis:], BATCH in shape)


def spec_of(tensor: StepTensor) -> pb.TensorSpec:
    """Describes a tensor; the reverse of `tensor_of`."""
    shape = [*map(str, tensor.before), *([BATCH] if tensor.batched else []), *map(str, tensor.after)]
    return pb.TensorSpec(name=tensor.name, dtype=tensor.dtype.name, shape=shape)


def initial_of(state: pb.StateSpec, tensor: StepTensor) -> np.ndarray[Any, np.dtype[Any]]:
    """Reads the value of a state tensor before the first step, without the batch."""
    if not state.initial:
        return np.zeros(tensor.dims, tensor.dtype)
    stored = np.frombuffer(state.initial, tensor.dtype.newbyteorder("<")).reshape(tensor.dims)
    return stored.astype(tensor.dtype)


def check(manifest: pb.BundleManifest) -> None:
    """Checks what a manifest says of a step model.

    Raises:
        ValueError: it contradicts itself, or is over a limit.
    """
    step, whole = manifest.step, manifest.step.form == WHOLE
    expected = WHOLE if whole else ARCHITECTURE
    _require(manifest.architecture == expected, f"step given for architecture {manifest.architecture!r}")
    _require(not (manifest.hidden_size or manifest.num_layers), "hidden_size and num_layers of a step model are 0")
    _require(not manifest.feature_names, "feature_names of a step model are empty")
    forms = (*FORMS, WHOLE)
    _require(step.form in forms, f"step.form {step.form!r}, one of {', '.join(forms)} expected")
    right = len(step.source_sha256) == 64 and set(step.source_sha256) <= set("0123456789abcdef")
    _require(right, "step.source_sha256: 64 hexadecimal digits expected")
    if whole:
        right = len(step.inputs) == 1 and sorted(step.inputs[0].shape[:2]) == [BATCH, TIME]
        _require(right, "step.inputs: one that begins with the dimensions batch and time expected")
        _require(not step.states, "step.states: given for a graph of whole sequences")
    inputs = _tensors("inputs", step.inputs, INPUT_DTYPES, step.alone, timed=whole)
    outputs = _tensors("outputs", step.outputs, OUTPUT_DTYPES, step.alone or whole)
    given_states = [state.tensor for state in step.states]
    states = [] if whole else _tensors("states", given_states, STATE_DTYPES, step.alone)
    _unique("inputs and states", [tensor.name for tensor in (*inputs, *states)])
    nexts = [state.next for state in step.states if state.next]
    _unique("outputs and next states", [tensor.name for tensor in outputs] + nexts)
    for name, tensors, size in (("input", inputs, manifest.input_size), ("output", outputs, manifest.output_size)):
        found = sum(tensor.size for tensor in tensors)
        _require(found == size, f"{name}_size {size}, step.{name}s have {found} values")
    total = sum(tensor.nbytes for tensor in states)
    _require(total <= MAX_STATE_BYTES, f"step.states: {total} bytes a sequence, {MAX_STATE_BYTES} at most")
    for state, tensor in zip(step.states, states, strict=True):
        given = len(state.initial)
        where = f"step.states: {tensor.name!r}: initial"
        _require(given in (0, tensor.nbytes), f"{where} has {given} bytes, {tensor.nbytes} expected")
        _require(bool(np.isfinite(initial_of(state, tensor)).all()), f"{where} has values that are not finite")
    labels, scores = len(manifest.class_labels), outputs[0].size
    if labels:
        fits = labels == len(set(manifest.class_labels)) == max(scores, 2)
        _require(fits, f"class_labels: {labels} for the {scores} values of {outputs[0].name!r}, distinct ones expected")


def _tensors(
    field: str, specs: Sequence[pb.TensorSpec], dtypes: tuple[str, ...], alone: bool, timed: bool = False
) -> list[StepTensor]:
    for spec in specs:
        right = list(spec.shape).count(TIME) == timed
        _require(right, f"step.{field}: {spec.name!r}: shape {list(spec.shape)}")
    try:
        tensors = [tensor_of(spec) for spec in specs]
    except ValueError as error:
        raise ValueError(f"step.{field}: {error}") from None
    _require(1 <= len(tensors) <= MAX_TENSORS, f"step.{field}: {len(tensors)} given, 1 to {MAX_TENSORS} expected")
    for tensor in tensors:
        problem = f"step.{field}: {tensor.name!r}: dtype {tensor.dtype}, one of {', '.join(dtypes)} expected"
        _require(tensor.dtype.name in dtypes, problem)
        _require(tensor.batched or alone, f"step.{field}: {tensor.name!r} has no batch, and the model isn't alone")
    return tensors


def _unique(what: str, names: list[str]) -> None:
    twice = next((name for index, name in enumerate(names) if name in names[:index]), None)
    _require(twice is None, f"step: two {what} are named {twice!r}")


def _require(condition: bool, problem: str) -> None:
    if not condition:
        raise ValueError(problem)
