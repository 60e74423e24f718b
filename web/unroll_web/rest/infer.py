"""Inference of the Open Inference Protocol over HTTP, with the extension for binary data."""

import json
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from unroll_proto.inference import service_pb2 as pb
from unroll_web.context import Context
from unroll_web.problems import Problem
from unroll_web.rest.body import Members, parse_json, read_body
from unroll_web.rest.messages import to_json
from unroll_web.rest.tensors import BinaryData, add_input, elements, set_parameters

HEADER_LENGTH = "inference-header-content-length"
SERVICE = "/inference.GRPCInferenceService"


async def infer(request: Request, context: Context) -> Response:
    """Answers `POST /v2/models/{name}[/versions/{version}]/infer`."""
    body = await read_body(request, context)
    size = _header_length(request, len(body))
    members, binary = parse_json(body[:size]), BinaryData(body[size:])
    call = pb.ModelInferRequest(
        model_name=request.path_params["name"],
        model_version=request.path_params.get("version", ""),
        id=members.take("id", str, ""),
    )
    by_default = _binary(set_parameters(call.parameters, members, ""), "binary_data_output", False)
    for index, value in enumerate(members.take("inputs", list)):
        where = f"inputs[{index}]"
        add_input(call, _members(value, where), f"{where}.", binary)
    wanted: dict[str, bool] = {}
    for index, value in enumerate(members.take("outputs", list, [])):
        where = f"outputs[{index}]"
        output = _members(value, where)
        added = call.outputs.add(name=output.take("name", str))
        own = set_parameters(added.parameters, output, f"{where}.")
        wanted[added.name] = _binary(own, "binary_data", by_default)
        output.end()
    members.end()
    binary.end()
    async with context.client(request) as client:
        answer = await client.call(f"{SERVICE}/ModelInfer", call, pb.ModelInferResponse)
    return _encoded(answer, wanted, by_default)


def _header_length(request: Request, size: int) -> int:
    given = request.headers.get(HEADER_LENGTH)
    if given is None:
        return size
    if not given.isascii() or not given.isdigit() or int(given[:20]) > size:
        raise Problem(400, f"{HEADER_LENGTH}: {given[:64]!r}, 0 to the body's {size} bytes expected")
    return int(given)


def _members(value: Any, where: str) -> Members:
    if not isinstance(value, dict):
        raise Problem.at(where, "an object expected")
    return Members(value, f"{where}.")


def _binary(own: dict[str, Any], name: str, default: bool) -> bool:
    """Takes the parameter that asks for binary data."""
    value = own.pop(name, default)
    for other in own:
        raise Problem.at(f"parameters[{other[:64]}]", f"unknown here; {name} is")
    if not isinstance(value, bool):
        raise Problem.at(f"parameters[{name}]", "true or false expected")
    return value


def _encoded(answer: pb.ModelInferResponse, wanted: dict[str, bool], by_default: bool) -> Response:
    content: dict[str, Any] = {"model_name": answer.model_name, "model_version": answer.model_version}
    if answer.id:
        content["id"] = answer.id
    if answer.parameters:
        content["parameters"] = to_json(answer)["parameters"]
    outputs, parts = [], []
    for output, raw in zip(answer.outputs, answer.raw_output_contents, strict=True):
        tensor: dict[str, Any] = {"name": output.name, "datatype": output.datatype, "shape": list(output.shape)}
        if wanted.get(output.name, by_default):
            tensor["parameters"] = {"binary_data_size": len(raw)}
            parts.append(raw)
        else:
            tensor["data"] = elements(raw, output.datatype, output.name)
        outputs.append(tensor)
    header = json.dumps(content | {"outputs": outputs}, ensure_ascii=False).encode()
    if not parts:
        return Response(header, media_type="application/json")
    headers = {HEADER_LENGTH: str(len(header))}
    return Response(b"".join([header, *parts]), headers=headers, media_type="application/octet-stream")
