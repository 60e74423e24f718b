"""The Open Inference Protocol by generated code: makes requests and reads answers."""

from typing import Any

import grpc
import numpy as np
from numpy.typing import NDArray

from support import wire
from support.processes import PATIENCE
from unroll_proto.inference import service_pb2 as pb
from unroll_proto.inference.service_pb2_grpc import GRPCInferenceServiceStub

_DTYPES = {"FP32": "<f4", "INT64": "<i8"}


def request_of(
    values: wire.Array, *outputs: str, model: str = "jv", request_id: str = "", **parameters: Any
) -> pb.ModelInferRequest:
    """Makes a raw request for values [batch, time, features]."""
    request = pb.ModelInferRequest(model_name=model, id=request_id, raw_input_contents=[wire.to_bytes(values)])
    request.inputs.add(name="input", datatype="FP32", shape=values.shape)
    for output in outputs:
        request.outputs.add(name=output)
    for name, value in parameters.items():
        kind = {bool: "bool_param", int: "int64_param", str: "string_param"}[type(value)]
        setattr(request.parameters[name], kind, value)
    return request


def outputs_of(response: pb.ModelInferResponse) -> dict[str, wire.Array]:
    """Returns the float32 outputs by name."""
    return {
        output.name: np.frombuffer(raw, "<f4").reshape(output.shape)
        for output, raw in zip(response.outputs, response.raw_output_contents, strict=True)
    }


def infer(
    address: str, model: str, outputs: tuple[str, ...] = (), sequence: int = 0, **given: Any
) -> dict[str, NDArray[Any]]:
    """Returns the outputs of a request whose inputs are `given`; `start`, of a sequence, is a parameter."""
    request = pb.ModelInferRequest(model_name=model)
    if sequence:
        request.parameters["sequence_id"].int64_param = sequence
        request.parameters["sequence_start"].bool_param = bool(given.pop("start", False))
    for name, array in given.items():
        datatype = {"f": "FP", "i": "INT"}[array.dtype.kind] + str(8 * array.dtype.itemsize)
        request.inputs.add(name=name, datatype=datatype, shape=array.shape)
        request.raw_input_contents.append(array.tobytes())
    for name in outputs:
        request.outputs.add(name=name)
    with grpc.insecure_channel(address) as channel:
        stub: Any = GRPCInferenceServiceStub(channel)  # type: ignore[arg-type]  # made for both kinds
        response = stub.ModelInfer(request, timeout=PATIENCE)
    return {
        output.name: np.frombuffer(raw, _DTYPES[output.datatype]).reshape(output.shape)
        for output, raw in zip(response.outputs, response.raw_output_contents, strict=True)
    }
