"""Tensors of the Open Inference Protocol to and from numpy, with checks of names, types, shapes, sizes and limits."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unroll_engine.errors import InvalidRequestError
from unroll_engine.jobs import span
from unroll_engine.models.spec import Float32Array, ModelSpec, State
from unroll_proto.inference import service_pb2 as pb
from unroll_server.api.data_plane import check_finite
from unroll_server.config import Limits

INPUTS = {
    "input": (("FP32",), 3),
    "lengths": (("INT32", "INT64", "UINT32", "UINT64"), 1),
    "initial_state": (("FP32",), 3),
    "initial_cell": (("FP32",), 3),
}
"""Data types and number of dimensions of each input; the first dimension is the batch."""
TYPED = {
    "FP32": "fp32_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
}
"""Field of InferTensorContents for each data type."""

_WIRE: dict[str, np.dtype[Any]] = {
    "FP32": np.dtype("<f4"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
}


@dataclass(frozen=True, slots=True)
class Inputs:
    """The tensors of a request; shapes and sizes are checked, values are not yet.

    Attributes:
        values: [batch, time, features].
        lengths: int64 [batch], timesteps of each sequence; None if all have `time`.
        initial: [batch, num_layers, hidden_size] each, by input; empty is the zero state.
    """

    values: Float32Array
    lengths: NDArray[np.int64] | None
    initial: dict[str, Float32Array]

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


def decode(request: pb.ModelInferRequest, limits: Limits, shortest: int = 1) -> Inputs:
    """Returns views of a request's tensors, after the checks that need no model.

    Args:
        request: As the caller sent it.
        limits: Limits of one request.
        shortest: Least number of timesteps of a sequence.

    Raises:
        InvalidRequestError: a tensor is wrong or over a limit.
    """
    arrays = _arrays(request)
    values = arrays.get("input")
    if values is None:
        raise InvalidRequestError("the input `input` is missing", "inputs")
    batch, longest, _ = values.shape
    if not 1 <= batch <= limits.max_sequences:
        raise InvalidRequestError(f"`input` holds {batch} sequences, 1 to {limits.max_sequences} allowed", "inputs")
    if not shortest <= longest <= limits.max_steps:
        problem = f"`input` holds {longest} timesteps a sequence, {shortest} to {limits.max_steps} allowed"
        raise InvalidRequestError(problem, "inputs")
    for name, array in arrays.items():
        if len(array) != batch:
            raise InvalidRequestError(f"`{name}` is for {len(array)} sequences, `input` holds {batch}", "inputs")
    lengths = arrays.get("lengths")
    if lengths is not None:
        # Before the conversion: an unsigned number can be too large for int64.
        wrong = np.flatnonzero((lengths < shortest) | (lengths > longest))
        if len(wrong):
            problem = f"`lengths` gives {lengths[wrong[0]]} for sequence {wrong[0]}, {shortest} to {longest} allowed"
            raise InvalidRequestError(problem, "inputs")
        lengths = lengths.astype(np.int64)
    initial = {name: array for name, array in arrays.items() if name.startswith("initial_")}
    return Inputs(values, lengths, initial)


def ragged(inputs: Inputs, spec: ModelSpec) -> tuple[Float32Array, NDArray[np.int64]]:
    """Packs the sequences end to end: [total_steps, input_size], and where each begins, int64 [batch + 1].

    Values past a sequence's length are ignored.

    Raises:
        InvalidRequestError: the number of features is wrong, or a value is not finite.
    """
    values, lengths = inputs.values, inputs.lengths
    batch, longest, features = values.shape
    if features != spec.input_size:
        problem = f"`input` has {features} features, {spec.key} takes {spec.input_size}"
        raise InvalidRequestError(problem, "inputs")
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
    """Returns the states before the first steps, [num_layers, batch, hidden_size] each; None is the zero state.

    Raises:
        InvalidRequestError: tensors or shapes are not the model's, or a value is not finite.
    """
    given = inputs.initial
    if not given:
        return None
    shapes = {f"initial_{name}": shape for name, shape, *_ in spec.states}
    if given.keys() != shapes.keys():
        problem = f"{', '.join(sorted(given))} given, {spec.key} takes {' with '.join(shapes)}, or none"
        raise InvalidRequestError(problem, "inputs")
    for name, shape in shapes.items():
        array = given[name]
        if array.shape[1:] != shape:
            problem = f"`{name}` is {list(array.shape)}, {spec.key} takes {[inputs.batch, *shape]}"
            raise InvalidRequestError(problem, "inputs")
        if not np.isfinite(array).all():
            raise InvalidRequestError(f"`{name}` holds a value that is not finite", "inputs")
    return tuple([np.ascontiguousarray(given[name].transpose(1, 0, 2)) for name in shapes])


def encode(response: pb.ModelInferResponse, name: str, array: Float32Array) -> None:
    """Adds a float32 output to a response."""
    response.outputs.add(name=name, datatype="FP32", shape=array.shape)
    response.raw_output_contents.append(array.astype(_WIRE["FP32"], copy=False).tobytes())


def encode_classes(
    response: pb.ModelInferResponse, name: str, array: Float32Array, count: int, labels: Sequence[str]
) -> None:
    """Adds an output of BYTES "value:index:label", [batch, count]: the largest values of each row, in falling order.

    Args:
        response: Takes the output.
        name: Name of the output.
        array: [batch, classes].
        count: Classes of each row, at most.
        labels: Labels of the classes.
    """
    # Equal values: the lower index first.
    order = np.argsort(-array, axis=1, kind="stable")[:, :count]
    texts = [
        f"{row[index]:f}:{index}:{labels[index]}".encode()
        for row, indices in zip(array, order.tolist(), strict=True)
        for index in indices
    ]
    response.outputs.add(name=name, datatype="BYTES", shape=order.shape)
    response.raw_output_contents.append(b"".join(len(text).to_bytes(4, "little") + text for text in texts))


def _arrays(request: pb.ModelInferRequest) -> dict[str, NDArray[Any]]:
    """Returns the inputs by name, with checked type, number of dimensions and number of elements."""
    raw = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        problem = f"{len(raw)} given, one for each of the {len(request.inputs)} inputs expected"
        raise InvalidRequestError(problem, "raw_input_contents")
    arrays: dict[str, NDArray[Any]] = {}
    for index, tensor in enumerate(request.inputs):
        name, field = tensor.name, f"inputs[{index}]"
        if name not in INPUTS:
            raise InvalidRequestError(f"no input {name!r}; there are {', '.join(INPUTS)}", f"{field}.name")
        if name in arrays:
            raise InvalidRequestError(f"`{name}` is given twice", f"{field}.name")
        datatypes, rank = INPUTS[name]
        datatype = tensor.datatype
        if datatype not in datatypes:
            problem = f"`{name}` is {' or '.join(datatypes)}, not {datatype[:32]!r}"
            raise InvalidRequestError(problem, f"{field}.datatype")
        for parameter, value in tensor.parameters.items():
            _check_parameter(parameter, value, raw[index] if raw else None, f"{field}.parameters[{parameter[:64]}]")
        shape = list(tensor.shape)
        # numpy has its own limit, which empty arrays can be over too.
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
    """Checks the parameter in which MLServer's clients give the content type of a tensor; only arrays are known.

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
        # Of KServe's protocol over HTTP.
        size = value.int64_param or value.uint64_param
        if size != len(raw):
            raise InvalidRequestError(f"{size}, and raw_input_contents has {len(raw)} bytes", field)
    elif name.startswith("shared_memory"):
        raise InvalidRequestError("shared memory is not supported", field)
    else:
        raise InvalidRequestError("unknown; an input takes `content_type`, and `binary_data_size` if it is raw", field)


def _raw(raw: bytes, datatype: str, shape: list[int], field: str) -> NDArray[Any]:
    wire = _WIRE[datatype]
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
    return np.array(elements, _WIRE[datatype].newbyteorder("=")).reshape(shape)
