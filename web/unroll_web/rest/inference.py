"""Health, metadata and repository of the Open Inference Protocol over HTTP."""

import json
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from unroll_proto.inference import service_pb2 as pb
from unroll_web.context import Context
from unroll_web.problems import Problem
from unroll_web.rest.body import read_json
from unroll_web.rest.infer import SERVICE
from unroll_web.rest.messages import to_json

BINARY_EXTENSION = "binary_tensor_data"


async def live(request: Request, context: Context) -> Response:
    """Answers `GET /v2/health/live`."""
    async with context.client(request) as client:
        answer = await client.call(f"{SERVICE}/ServerLive", pb.ServerLiveRequest(), pb.ServerLiveResponse)
    return _truth(answer.live, Problem(503, "the server is not live"))


async def ready(request: Request, context: Context) -> Response:
    """Answers `GET /v2/health/ready`."""
    async with context.client(request) as client:
        answer = await client.call(f"{SERVICE}/ServerReady", pb.ServerReadyRequest(), pb.ServerReadyResponse)
    return _truth(answer.ready and not context.draining.is_set(), Problem(503, "the server takes no calls"))


async def model_ready(request: Request, context: Context) -> Response:
    """Answers `GET /v2/models/{name}[/versions/{version}]/ready`."""
    call = pb.ModelReadyRequest(**_model(request))
    async with context.client(request) as client:
        answer = await client.call(f"{SERVICE}/ModelReady", call, pb.ModelReadyResponse)
    return _truth(answer.ready, Problem(404, "the model is not ready, or not served"))


async def server_metadata(request: Request, context: Context) -> Response:
    """Answers `GET /v2`."""
    async with context.client(request) as client:
        answer = await client.call(f"{SERVICE}/ServerMetadata", pb.ServerMetadataRequest(), pb.ServerMetadataResponse)
    answer.extensions.append(BINARY_EXTENSION)
    return _json(to_json(answer))


async def model_metadata(request: Request, context: Context) -> Response:
    """Answers `GET /v2/models/{name}[/versions/{version}]`."""
    call = pb.ModelMetadataRequest(**_model(request))
    async with context.client(request) as client:
        answer = await client.call(f"{SERVICE}/ModelMetadata", call, pb.ModelMetadataResponse)
    return _json(to_json(answer))


async def model_config(request: Request, context: Context) -> Response:
    """Answers `GET /v2/models/{name}[/versions/{version}]/config`."""
    call = pb.ModelConfigRequest(**_model(request))
    async with context.client(request) as client:
        answer = await client.call(f"{SERVICE}/ModelConfig", call, pb.ModelConfigResponse)
    return _json(to_json(answer.config))


async def statistics(request: Request, context: Context) -> Response:
    """Answers `GET /v2/models[/{name}[/versions/{version}]]/stats`."""
    call = pb.ModelStatisticsRequest(**_model(request))
    async with context.client(request) as client:
        answer = await client.call(f"{SERVICE}/ModelStatistics", call, pb.ModelStatisticsResponse)
    return _json(to_json(answer))


async def repository_index(request: Request, context: Context) -> Response:
    """Answers `POST /v2/repository/index`."""
    call = pb.RepositoryIndexRequest()
    if int(request.headers.get("content-length", "0")) or "transfer-encoding" in request.headers:
        members = await read_json(request, context)
        call.ready = members.take("ready", bool, False)
        members.end()
    async with context.client(request) as client:
        answer = await client.call(f"{SERVICE}/RepositoryIndex", call, pb.RepositoryIndexResponse)
    return _json([to_json(model) for model in answer.models])


def _model(request: Request) -> dict[str, str]:
    return {name: request.path_params.get(name, "") for name in ("name", "version")}


def _truth(answer: bool, problem: Problem) -> Response:
    if not answer:
        raise problem
    return Response()


def _json(content: Any) -> Response:
    return Response(json.dumps(content, ensure_ascii=False), media_type="application/json")
