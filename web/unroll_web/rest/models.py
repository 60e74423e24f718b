"""The served models, in JSON."""

import dataclasses
import json
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from unroll_client import ModelInfo
from unroll_web.context import Context
from unroll_web.problems import Problem


async def list_models(request: Request, context: Context) -> Response:
    """Answers `GET /v1/models`."""
    async with context.client(request) as client:
        models = await client.models()
    return Response(json.dumps({"models": [_described(model) for model in models]}), media_type="application/json")


async def describe_model(request: Request, context: Context) -> Response:
    """Answers `GET /v1/models/{name}`, with the version of the query."""
    version = request.query_params.get("version", "0")
    if not version.isascii() or not version.isdigit() or len(version) > 10 or int(version) >= 2**32:
        raise Problem.at("version", f"0 to {2**32 - 1} expected")
    async with context.client(request) as client:
        model = await client.model(request.path_params["name"], int(version))
    return Response(json.dumps(_described(model)), media_type="application/json")


def _described(model: ModelInfo) -> dict[str, Any]:
    tensors = {
        name: [{"name": each.name, "dtype": each.dtype, "shape": list(each.shape)} for each in getattr(model, name)]
        for name in ("inputs", "outputs", "states")
    }
    return dataclasses.asdict(model) | tensors
