"""Lists and describes the served models."""

import dataclasses
import json

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from unroll_web.context import Context


def model_routes(context: Context) -> list[Route]:
    """Returns the routes of models."""

    async def list_models(request: Request) -> Response:
        async with context.client(request) as client:
            models = await client.models()
        content = {"models": [dataclasses.asdict(model) for model in models]}
        return Response(json.dumps(content), media_type="application/json")

    return [Route("/v1/models", list_models)]
