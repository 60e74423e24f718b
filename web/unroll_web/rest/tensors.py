"""Tensors of the Open Inference Protocol over HTTP: JSON and binary data, to and from raw bytes."""

import math
import struct
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unroll_proto.inference import service_pb2 as pb
from unroll_web.problems import Problem
from unroll_web.rest.body import Members, check_text, printable

DATATYPES = {
    "BOOL": np.dtype("?"),
    "UINT8": np.dtype("u1"),
    "UINT16": np.dtype("<u2"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "INT8": np.dtype("i1"),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "FP16": np.dtype("<f2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
}
"""Number formats by the protocol's names."""


def set_parameters(target: Any, members: Members, where: str) -> dict[str, Any]:
    """Moves the member `parameters` of an object into a map of InferParameter, except those about binary data.

    Args:
        target: The map.
        members: Members of the object.
        where: Place of the object in the body: empty, or ending with a dot.

    Returns:
        Those about binary data, which only HTTP has.

    Raises:
        Problem: a value is neither a number, a text nor true or false.
    """
    own: dict[str, Any] = {}
    for name, value in members.take("parameters", dict, {}).items():
        field = f"{where}parameters[{printable(name)}]"
        check_text(name, field)
        match value:
            case _ if name.startswith("binary_data"):
                own[name] = value
            case bool():
                target[name].bool_param = value
            case int() if -(2**63) <= value < 2**63:
                target[name].int64_param = value
            case int() if 0 <= value < 2**64:
                target[name].uint64_param = value
            case float():
                target[name].double_param = value
            case str():
                check_text(value, field)
                target[name].string_param = value
            case _:
                raise Problem.at(field, "an integer of 64 bits, a number, a text, true or false expected")
    return own


class BinaryData:
    """The part of a body after its JSON.

    Args:
        data: All of it: the tensors' elements one after another.
    """

    def __init__(self, data: bytes) -> None:
        self._left = memoryview(data)

    def take(self, size: Any, field: str) -> bytes:
        """Takes the data of the next tensor.

        Raises:
            Problem: fewer bytes are left.
        """
        if type(size) is not int or not 0 <= size <= len(self._left):
            raise Problem.at(field, f"a number of bytes, 0 to the {len(self._left)} that are left, expected")
        data, self._left = self._left[:size], self._left[size:]
        return bytes(data)

    def end(self) -> None:
        """Raises Problem if some are left."""
        if self._left:
            raise Problem.at("inputs", f"{len(self._left)} bytes of binary data belong to none")


def add_input(request: pb.ModelInferRequest, members: Members, where: str, binary: BinaryData) -> None:
    """Adds an input to a request, with its elements as raw bytes.

    Args:
        request: The request.
        members: Members of the input.
        where: Its place in the body, ending with a dot.
        binary: Binary data of the request.

    Raises:
        Problem: the input can't be read. Whether it is the model's is checked by the server.
    """
    tensor = request.inputs.add(name=members.take("name", str), datatype=members.take("datatype", str))
    shape = members.take("shape", list)
    if not all(type(size) is int and 0 <= size < 2**63 for size in shape):
        raise Problem.at(f"{where}shape", "a list of sizes expected")
    tensor.shape.extend(shape)
    own = set_parameters(tensor.parameters, members, where)
    size = own.pop("binary_data_size", None)
    data = members.take("data", list, []) if size is not None else members.take("data", list)
    members.end()
    for name in own:
        raise Problem.at(f"{where}parameters[{printable(name)}]", "unknown; an input takes binary_data_size")
    if size is None:
        request.raw_input_contents.append(_raw(data, tensor.datatype, math.prod(shape), f"{where}data"))
    elif data:
        raise Problem.at(f"{where}data", "given beside binary_data_size; give either")
    else:
        request.raw_input_contents.append(binary.take(size, f"{where}parameters[binary_data_size]"))


def _raw(data: list[Any], datatype: str, count: int, field: str) -> bytes:
    dtype = DATATYPES.get(datatype)
    if dtype is None:
        return b""  # The server refuses the type, with those that it takes.
    try:
        array = np.array(data)
    except ValueError:
        raise Problem.at(field, "a list of numbers, or lists of equal lengths, expected") from None
    if array.size != count:
        raise Problem.at(field, f"{array.size} elements, {count} expected by the shape")
    if not array.size:
        return b""
    kinds = {"f": "fiub", "b": "b"}.get(dtype.kind, "iu")
    if array.dtype.kind not in kinds:
        raise Problem.at(field, f"numbers of {datatype} expected")
    if dtype.kind in "iu" and (array.astype(dtype) != array).any():
        raise Problem.at(field, f"a number is out of the range of {datatype}")
    with np.errstate(over="ignore"):  # The server refuses values that are not finite, and says where.
        return array.astype(dtype).tobytes()


def elements(raw: bytes, datatype: str, name: str) -> list[Any]:
    """Returns the elements of an output for JSON, flat.

    Raises:
        Problem: one is not finite, which JSON's numbers can't be.
    """
    if datatype == "BYTES":
        return _texts(raw)
    array: NDArray[Any] = np.frombuffer(raw, DATATYPES[datatype])
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        what = "a value is not finite, which JSON can't hold as a number; ask for binary_data"
        raise Problem.at(f"outputs[{printable(name)}]", what)
    return list(array.tolist())


def _texts(raw: bytes) -> list[str]:
    texts, place = [], 0
    while place < len(raw):
        (size,) = struct.unpack_from("<I", raw, place)
        place += 4
        texts.append(raw[place : place + size].decode())
        place += size
    return texts
