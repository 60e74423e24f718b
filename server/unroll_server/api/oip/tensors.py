"""Tensors of the Open Inference Protocol: conversion to and from numpy; checks of names, types, shapes and sizes."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unroll_engine.arrays import to_bytes
from unroll_engine.errors import InvalidRequestError
from unroll_engine.jobs import span
from unroll_engine.models.spec import Float32Array, ModelSpec, State, Tensor
from unroll_proto.inference import service_pb2 as pb
from unroll_server.api.data_plane import check_finite
from unroll_server.api.oip.signature import DATATYPES, Described, datatype_of, inputs_of
from unroll_server.config import Limits

TYPED = {
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
}
"""Field of InferTensorContents for each data type."""
_EXACT = 2**24
"""Largest whole number up to which float32 has all."""


@dataclass(frozen=True, slots=True)
class Inputs:
    """The tensors of a request; shapes and sizes are checked, values are not yet.

    Attributes:
        values: float32 [batch, time, input_size].
        lengths: int64 [batch], timesteps of each sequence; None for `time`.
        initial: [batch, rows, size] each, by input; empty for the initial state.
    """

    values: Float32Array
    lengths: NDArray[np.int64] | None
    initial: dict[str, NDArray[Any]]

    @property
    def batch(self) -> int:
        """Number of sequences."""
        return len(self.values)

    @property
    def longest(self) -> int:
        """Timesteps of each sequence, with its padding."""
        return int(self.values.shape[1])

    @property
    def shortest(self) -> int:
        """Timesteps of the shortest sequence, without padding."""
        return self.longest if self.lengths is None else int(self.lengths.min())


def decode(request: pb.ModelInferRequest, spec: ModelSpec, limits: Limits, shortest: int = 1) -> Inputs:
    """Returns a request's tensors after the checks of names, types, shapes and limits; without integers no copies.

    Args:
        request: The caller's request.
        spec: The model.
        limits: Limits of one request.
        shortest: Least number of timesteps of a sequence.

    Raises:
        InvalidRequestError: a tensor is wrong or over a limit.
    """
    arrays = _arrays(request, {each.name: each for each in inputs_of(spec)})
    names = [name for name, *_ in spec.inputs]
    for name in names:
        if name not in arrays:
            raise InvalidRequestError(f"the input `{name}` is missing", "inputs")
    first = names[0]
    batch, longest = arrays[first].shape[:2]
    if not 1 <= batch <= limits.max_sequences:
        raise InvalidRequestError(f"`{first}` holds {batch} sequences, 1 to {limits.max_sequences} allowed", "inputs")
    if not shortest <= longest <= limits.max_steps:
        problem = f"`{first}` holds {longest} timesteps a sequence, {shortest} to {limits.max_steps} allowed"
        raise InvalidRequestError(problem, "inputs")
    for name, array in arrays.items():
        if len(array) != batch:
            raise InvalidRequestError(f"`{name}` is for {len(array)} sequences, `{first}` holds {batch}", "inputs")
    lengths = arrays.get("lengths")
    if lengths is not None:
        # Checked before the conversion: an unsigned number can exceed int64.
        wrong = np.flatnonzero((lengths < shortest) | (lengths > longest))
        if len(wrong):
            problem = f"`lengths` gives {lengths[wrong[0]]} for sequence {wrong[0]}, {shortest} to {longest} allowed"
            raise InvalidRequestError(problem, "inputs")
        lengths = lengths.astype(np.int64)
    parts = [_values(arrays[tensor.name], tensor, spec, longest) for tensor in spec.inputs]
    initial = {name: array for name, array in arrays.items() if name.startswith("initial_") and name not in names}
    return Inputs(parts[0] if len(parts) == 1 else np.concatenate(parts, axis=2), lengths, initial)


def _values(array: NDArray[Any], tensor: Tensor, spec: ModelSpec, longest: int) -> Float32Array:
    """Returns the values of an input as float32 [batch, time, size]."""
    name, shape, _ = tensor
    if array.shape[2:] != shape:
        if len(shape) == 1:
            problem = f"`{name}` has {array.shape[2]} features, {spec.key} takes {shape[0]}"
        else:
            problem = f"`{name}` is {list(array.shape)}, {spec.key} takes {['batch', 'time', *shape]}"
        raise InvalidRequestError(problem, "inputs")
    if array.shape[1] != longest:
        raise InvalidRequestError(f"`{name}` holds {array.shape[1]} timesteps, others hold {longest}", "inputs")
    if array.dtype.kind in "iu" and array.size and (array.max() > _EXACT or array.min() < -_EXACT):
        raise InvalidRequestError(f"`{name}` holds a number beyond {_EXACT}, which float32 can't represent", "inputs")
    return array.reshape(*array.shape[:2], math.prod(shape)).astype(np.float32, copy=False)


def ragged(inputs: Inputs) -> tuple[Float32Array, NDArray[np.int64]]:
    """Concatenates the sequences: [total_steps, input_size], and their offsets, int64 [batch + 1].

    Values past a sequence's length are ignored.

    Raises:
        InvalidRequestError: a value is not finite.
    """
    values, lengths = inputs.values, inputs.lengths
    batch, longest, features = values.shape
    if lengths is None or (lengths == longest).all():
        rows = values.reshape(batch * longest, features)
        offsets = span(longest) if batch == 1 else np.arange(batch + 1, dtype=np.int64) * longest
    else:
        rows = values[np.arange(longest) < lengths[:, np.newaxis]]
        offsets = np.zeros(batch + 1, np.int64)
        np.cumsum(lengths, out=offsets[1:])
    check_finite(rows, offsets, "inputs")
    return rows, offsets


def initial_state(inputs: Inputs, spec: ModelSpec) -> State | None:
    """Returns the states before the first steps, [rows, batch, size] each; None is the initial state.

    Raises:
        InvalidRequestError: tensors or shapes are not the model's, or a value is not finite.
    """
    given = inputs.initial
    if not given:
        return None
    tensors = {f"initial_{tensor.name}": tensor for tensor in spec.states}
    # The states of a trained network mean something together; those of a step model can be values of a sequence.
    if given.keys() != tensors.keys() and not spec.step:
        problem = f"{', '.join(sorted(given))} given, {spec.key} takes {' with '.join(tensors)}, or none"
        raise InvalidRequestError(problem, "inputs")
    state = list(spec.initial_state(inputs.batch))
    for index, (name, tensor) in enumerate(tensors.items()):
        array = given.get(name)
        if array is None:
            continue
        if array.shape[1:] != tensor.shape:
            problem = f"`{name}` is {list(array.shape)}, {spec.key} takes {[inputs.batch, *tensor.shape]}"
            raise InvalidRequestError(problem, "inputs")
        if not np.isfinite(array).all():
            raise InvalidRequestError(f"`{name}` holds a value that is not finite", "inputs")
        state[index] = np.ascontiguousarray(array.transpose(1, 0, 2))
    return tuple(state)


def encode(response: pb.ModelInferResponse, name: str, array: NDArray[Any]) -> None:
    """Adds an output to a response."""
    response.outputs.add(name=name, datatype=datatype_of(array.dtype), shape=array.shape)
    response.raw_output_contents.append(to_bytes(array))


def encode_classes(
    response: pb.ModelInferResponse, name: str, array: Float32Array, count: int, labels: Sequence[str]
) -> None:
    """Adds an output of BYTES "value:index:label", [batch, count]: the largest values of each row, in falling order.

    Args:
        response: Response to add the output to.
        name: Name of the output.
        array: [batch, classes].
        count: Most classes of each row.
        labels: Labels of the classes.
    """
    # Of equal values, the lower index comes first.
    order = np.argsort(-array, axis=1, kind="stable")[:, :count]
    texts = [
        f"{row[index]:f}:{index}:{labels[index]}".encode()
        for row, indices in zip(array, order.tolist(), strict=True)
        for index in indices
    ]
    response.outputs.add(name=name, datatype="BYTES", shape=order.shape)
    response.raw_output_contents.append(b"".join(len(text).to_bytes(4, "little") + text for text in texts))


def _arrays(request: pb.ModelInferRequest, known: Mapping[str, Described]) -> dict[str, NDArray[Any]]:
    """Returns the inputs by name, with checked type, number of dimensions and number of elements."""
    raw = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        problem = f"{len(raw)} given, one for each of the {len(request.inputs)} inputs expected"
        raise InvalidRequestError(problem, "raw_input_contents")
    arrays: dict[str, NDArray[Any]] = {}
    for index, tensor in enumerate(request.inputs):
        name, field = tensor.name, f"inputs[{index}]"
        if name not in known:
            raise InvalidRequestError(f"no input {name!r}; there are {', '.join(known)}", f"{field}.name")
        if name in arrays:
            raise InvalidRequestError(f"`{name}` is given twice", f"{field}.name")
        datatypes, rank = known[name].datatypes, len(known[name].shape)
        datatype = tensor.datatype
        if datatype not in datatypes:
            problem = f"`{name}` is {' or '.join(datatypes)}, not {datatype[:32]!r}"
            raise InvalidRequestError(problem, f"{field}.datatype")
        for parameter, value in tensor.parameters.items():
            _check_parameter(parameter, value, raw[index] if raw else None, f"{field}.parameters[{parameter[:64]}]")
        shape = list(tensor.shape)
        # numpy has its own limit, which even empty arrays can exceed.
        if len(shape) != rank or min(shape) < 0 or math.prod(max(size, 1) for size in shape) >= 2**31:
            problem = f"`{name}` is {shape[:8]}, {rank} dimensions expected, none below 0 and less than 2^31 elements"
            raise InvalidRequestError(problem, f"{field}.shape")
        if raw:
            # MLServer's client sends empty contents beside raw ones.
            if tensor.HasField("contents") and tensor.contents.ListFields():
                problem = "given beside raw_input_contents; give either, for all inputs"
                raise InvalidRequestError(problem, f"{field}.contents")
            arrays[name] = _raw(raw[index], datatype, shape, f"raw_input_contents[{index}]")
        else:
            arrays[name] = _typed(tensor.contents, datatype, shape, f"{field}.contents")
    return arrays


def check_content_type(value: pb.InferParameter, field: str) -> None:
    """Checks the parameter with which MLServer's clients give a tensor's content type; only arrays are supported.

    Raises:
        InvalidRequestError: it is another content type.
    """
    if value.string_param != "np":
        raise InvalidRequestError(f"{value.string_param[:64]!r}, 'np' in string_param expected", field)


def _check_parameter(name: str, value: pb.InferParameter, raw: bytes | None, field: str) -> None:
    """Accepts the parameters that clients of other servers always add to an input, and refuses others."""
    if name == "content_type":
        check_content_type(value, field)
    elif name == "binary_data_size" and raw is not None:
        # A parameter of KServe's protocol over HTTP.
        size = value.int64_param or value.uint64_param
        if size != len(raw):
            raise InvalidRequestError(f"{size}, and raw_input_contents has {len(raw)} bytes", field)
    elif name.startswith("shared_memory"):
        raise InvalidRequestError("shared memory is not supported", field)
    else:
        raise InvalidRequestError("unknown; an input takes `content_type`, and `binary_data_size` if it is raw", field)


def _raw(raw: bytes, datatype: str, shape: list[int], field: str) -> NDArray[Any]:
    wire = DATATYPES[datatype]
    expected = math.prod(shape) * wire.itemsize
    if len(raw) != expected:
        raise InvalidRequestError(f"{len(raw)} bytes, {expected} expected: {datatype} {shape}", field)
    array = np.frombuffer(raw, wire).reshape(shape)
    return array.astype(wire.newbyteorder("="), copy=False)


def _typed(contents: pb.InferTensorContents, datatype: str, shape: list[int], field: str) -> NDArray[Any]:
    own = TYPED[datatype]
    for descriptor, _ in contents.ListFields():
        if descriptor.name != own:
            raise InvalidRequestError(f"{datatype} is given in {own}, not in {descriptor.name}", field)
    elements = getattr(contents, own)
    expected = math.prod(shape)
    if len(elements) != expected:
        raise InvalidRequestError(f"{len(elements)} elements, {expected} expected: {datatype} {shape}", field)
    return np.array(elements, DATATYPES[datatype].newbyteorder("=")).reshape(shape)
