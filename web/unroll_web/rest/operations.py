"""The operations of the REST API: one table for routes and OpenAPI."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from unroll_web.context import Context
from unroll_web.rest import inference, models
from unroll_web.rest.classify import classify
from unroll_web.rest.infer import infer
from unroll_web.rest.unroll import unroll

JSON = "application/json"
BINARY = "application/octet-stream"
EVENTS = "text/event-stream"

Handler = Callable[[Request, Context], Awaitable[Response]]


@dataclass(frozen=True, slots=True)
class Operation:
    """One operation of the API.

    Attributes:
        name: Unique name.
        method: HTTP method.
        path: Path with parameters in braces.
        handler: Answers a request.
        tag: Group in the documentation.
        summary: One line.
        body: Name of the schema of the request's body; empty if it has none.
        answer: Name of the schema of the answer; empty for an empty one.
        media: Media types of the body and of the answer that are not JSON, by "body" and "answer".
        query: Parameters of the query, by name, with their schemas.
        body_optional: True if the body can be left out.
    """

    name: str
    method: str
    path: str
    handler: Handler
    tag: str
    summary: str
    body: str = ""
    answer: str = ""
    media: tuple[str, ...] = (JSON,)
    query: tuple[tuple[str, dict[str, Any]], ...] = ()
    body_optional: bool = False

    def route(self, context: Context) -> Route:
        """Returns the route."""

        async def endpoint(request: Request) -> Response:
            return await self.handler(request, context)

        return Route(self.path, endpoint, methods=[self.method], name=self.name)


async def alive(request: Request, context: Context) -> Response:
    """Answers while the web process runs, also while no server does."""
    return Response("ok\n", media_type="text/plain")


_VERSION = (("version", {"type": "integer", "minimum": 0, "maximum": 2**32 - 1, "description": "0 is the newest."}),)
_MODELS, _STREAMS, _INFERENCE, _PROCESS = "Models", "Sequences", "Open Inference Protocol", "Process"


def _versions(
    name: str, method: str, suffix: str, handler: Handler, summary: str, **others: Any
) -> tuple[Operation, Operation]:
    """Returns an operation on a model, and that on one of its versions."""
    return (
        Operation(name, method, f"/v2/models/{{name}}{suffix}", handler, _INFERENCE, f"{summary}.", **others),
        Operation(
            f"{name}_version",
            method,
            f"/v2/models/{{name}}/versions/{{version}}{suffix}",
            handler,
            _INFERENCE,
            f"{summary} (of one version).",
            **others,
        ),
    )


OPERATIONS: tuple[Operation, ...] = (
    Operation("list_models", "GET", "/v1/models", models.list_models, _MODELS, "Lists the models.", answer="Models"),
    Operation(
        "classify",
        "POST",
        "/v1/models/{name}:classify",
        classify,
        _STREAMS,
        "Classifies sequences of any lengths.",
        body="ClassifyRequest",
        answer="ClassifyResponse",
    ),
    Operation(
        "unroll",
        "POST",
        "/v1/models/{name}:unroll",
        unroll,
        _STREAMS,
        "Streams the state after each timestep, then a snapshot to resume from.",
        body="UnrollRequest",
        answer="Events",
        media=(EVENTS,),
    ),
    Operation(
        "describe_model",
        "GET",
        "/v1/models/{name}",
        models.describe_model,
        _MODELS,
        "Describes a model.",
        answer="Model",
        query=_VERSION,
    ),
    Operation("server_live", "GET", "/v2/health/live", inference.live, _INFERENCE, "200 if the server runs."),
    Operation("server_ready", "GET", "/v2/health/ready", inference.ready, _INFERENCE, "200 if it takes calls."),
    Operation(
        "server_metadata",
        "GET",
        "/v2",
        inference.server_metadata,
        _INFERENCE,
        "Name, version and extensions of the server.",
        answer="ServerMetadata",
    ),
    Operation(
        "repository_index",
        "POST",
        "/v2/repository/index",
        inference.repository_index,
        _INFERENCE,
        "Lists the versions in the repository, with their states.",
        body="IndexRequest",
        answer="Index",
        body_optional=True,
    ),
    Operation(
        "statistics",
        "GET",
        "/v2/models/stats",
        inference.statistics,
        _INFERENCE,
        "Counts of all models.",
        answer="Statistics",
    ),
    *_versions(
        "infer",
        "POST",
        "/infer",
        infer,
        "Runs a batch of sequences, or the next steps of one",
        body="InferRequest",
        answer="InferResponse",
        media=(JSON, BINARY),
    ),
    *_versions("model_ready", "GET", "/ready", inference.model_ready, "200 if the model takes calls"),
    *_versions(
        "model_config", "GET", "/config", inference.model_config, "Configuration of the model", answer="ModelConfig"
    ),
    *_versions("model_statistics", "GET", "/stats", inference.statistics, "Counts of the model", answer="Statistics"),
    *_versions("model_metadata", "GET", "", inference.model_metadata, "Tensors of the model", answer="ModelMetadata"),
    Operation("alive", "GET", "/healthz", alive, _PROCESS, "200 while the web process runs.", media=("text/plain",)),
)
"""All operations; of paths that both fit, the first one is taken."""
