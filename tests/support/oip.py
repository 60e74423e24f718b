"""The Open Inference Protocol by generated code: makes requests and reads answers."""

from typing import Any

import numpy as np

from support import wire
from unroll_proto.inference import service_pb2 as pb


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
