"""Opens untrusted ONNX files.

Files may differ only in nodes and weights: what `onnx.proto` lacks (data outside the file, functions,
training graphs) and other operator sets are refused, and every tensor is as large as the file says. `onnx_reader` is as
strict with the nodes, so ONNX Runtime can be given a file that was read.
"""

import math
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from unroll_engine.kernel.weights import UnsupportedNetworkError
from unroll_proto.onnx import onnx_pb2 as onnx

_OPSET = 17
_IR_VERSION = 8
_DTYPES: dict[int, np.dtype[Any]] = {onnx.TensorProto.FLOAT: np.dtype("<f4"), onnx.TensorProto.INT64: np.dtype("<i8")}


def parse(content: bytes) -> onnx.GraphProto:
    """Returns the graph of a file that holds nothing else.

    Raises:
        UnsupportedNetworkError: the file holds more, or is not an ONNX file.
    """
    model = known_only(content)
    opsets = [(opset.domain, opset.version) for opset in model.opset_import]
    require(opsets == [("", _OPSET)], f"operator sets {opsets[:4]}, version {_OPSET} of ONNX's own expected")
    require(model.ir_version == _IR_VERSION, f"IR version {model.ir_version}, {_IR_VERSION} expected")
    return model.graph


def known_only(content: bytes) -> onnx.ModelProto:
    """Parses a file; raises UnsupportedNetworkError if it has anything that `onnx.proto` lacks."""
    model = onnx.ModelProto()
    try:
        model.ParseFromString(content)
    except DecodeError:
        raise UnsupportedNetworkError("not an ONNX model") from None
    known = model.ByteSize()
    model.DiscardUnknownFields()
    require(model.ByteSize() == known, "it holds more than nodes, weights, inputs and outputs")
    return model


def array_of(tensor: onnx.TensorProto) -> NDArray[Any]:
    """Returns the values of an initializer, finite float32 or int64; a view of the file's bytes."""
    name, dtype, dims = f"tensor {short(tensor.name)}", _DTYPES.get(tensor.data_type), tuple(tensor.dims)
    if dtype is None:
        raise UnsupportedNetworkError(f"{name}: float32 or int64 expected")
    held = len(tensor.raw_data) == dtype.itemsize * math.prod(dims)
    require(held and min(dims, default=1) > 0, f"{name}: raw data of shape {short(list(dims))} expected")
    array = np.frombuffer(tensor.raw_data, dtype).reshape(dims)
    require(bool(np.isfinite(array).all()), f"{name}: has values that are not finite")
    return array


def require(condition: bool, problem: str) -> None:
    """Raises UnsupportedNetworkError with `problem` unless `condition` holds."""
    if not condition:
        raise UnsupportedNetworkError(problem)


def short(value: object) -> str:
    """Returns a name or a shape of the file, shortened for a message."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."
