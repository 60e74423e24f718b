"""Routes of the page: its files, its HTTP API under /page/api, its WebSocket at /page/socket."""

from importlib.resources import files
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import BaseRoute, Mount, Route, WebSocketRoute
from starlette.staticfiles import StaticFiles
from starlette.websockets import WebSocket

from unroll_client import ModelInfo
from unroll_proto.sequences import SequenceError
from unroll_web.context import Context
from unroll_web.page.figures import read_figures
from unroll_web.page.frames import pack_values
from unroll_web.page.moments import Moments
from unroll_web.page.socket import serve
from unroll_web.page.sources import Sources, read_upload
from unroll_web.problems import Problem

STATIC = Path(str(files("unroll_web.page") / "static"))
# The names of assets change with their content.
_FOREVER = {"cache-control": "public, max-age=31536000, immutable"}


class _Assets(StaticFiles):
    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        response = super().file_response(*args, **kwargs)
        response.headers.update(_FOREVER)
        return response


def routes(context: Context) -> list[BaseRoute]:
    """Returns the routes of the page."""
    page = _Page(context)
    return [
        Route("/", page.index),
        Route("/page/api/models", page.models),
        Route("/page/api/sources", page.sources),
        Route("/page/api/sources/{name}/{index:int}", page.sequence),
        Route("/page/api/import", page.upload, methods=["POST"]),
        Route("/page/api/figures", page.figures),
        WebSocketRoute("/page/socket", page.socket),
        Mount("/assets", _Assets(directory=STATIC / "assets", check_dir=False)),
    ]


class _Page:
    """Handlers of the page's requests."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._sources = Sources(context.settings.data)
        self._moments = Moments(self._sources)

    async def index(self, _: Request) -> Response:
        return FileResponse(STATIC / "index.html", headers={"cache-control": "no-cache"})

    async def models(self, request: Request) -> Response:
        async with self._context.client(request) as client:
            models = await client.models()
        weights = self._context.settings.models is not None
        return JSONResponse({"models": [_describe(model) for model in models], "weights": weights})

    async def sources(self, _: Request) -> Response:
        return JSONResponse({"sources": await self._sources.list()})

    async def sequence(self, request: Request) -> Response:
        name, index = request.path_params["name"], request.path_params["index"]
        try:
            source = await self._sources.get(name)
        except KeyError:
            raise Problem(404, f"name: no source {name[:100]!r}") from None
        except SequenceError as error:
            raise Problem(400, str(error)) from None
        if index >= len(source.sequences):
            raise Problem(404, f"index: {index}, {name} has {len(source.sequences)} sequences")
        found = source.sequences[index]
        return JSONResponse({"id": found.id, "label": found.label, "values": pack_values(found.values)})

    async def upload(self, request: Request) -> Response:
        try:
            return JSONResponse(await read_upload(request.query_params.get("name", ""), await request.body()))
        except SequenceError as error:
            raise Problem(400, str(error)) from None

    async def figures(self, _: Request) -> Response:
        return JSONResponse(await read_figures(self._context.settings.metrics))

    async def socket(self, socket: WebSocket) -> None:
        async with self._context.client(socket, reconnect_timeout=0) as client:
            await serve(socket, client, self._context.settings.models, self._moments, self._context.settings.target)


def _describe(model: ModelInfo) -> dict[str, Any]:
    accuracy = model.test_accuracy
    return {
        "name": model.name,
        "version": model.version,
        "architecture": model.architecture,
        "features": model.input_size,
        "hidden": model.hidden_size,
        "outputs": model.output_size,
        "layers": model.num_layers,
        "labels": () if model.architecture == "step" else model.class_labels,
        "names": model.feature_names,
        "output_names": [[each.name, list(each.shape)] for each in model.outputs],
        "runtime": model.runtime,
        "variant": model.runtime_variant,
        "note": model.runtime_note,
        "device": model.device,
        "bitwise": model.bitwise,
        "max_abs_diff": model.max_abs_diff,
        "accuracy": accuracy,
    }
