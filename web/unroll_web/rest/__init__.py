"""The REST API."""

import json
from importlib.resources import files

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from unroll_web.context import Context
from unroll_web.rest.openapi import describe
from unroll_web.rest.operations import OPERATIONS

_PAGE = {"api": "text/html", "api.css": "text/css", "api.js": "text/javascript"}


def routes(context: Context) -> list[BaseRoute]:
    """Returns the routes of the API, of its description and of the page to try it."""
    description = json.dumps(describe(OPERATIONS), ensure_ascii=False).encode()
    folder = files(__package__) / "static"
    pages = {name: (folder / (name if "." in name else f"{name}.html")).read_bytes() for name in _PAGE}

    async def describe_api(_: Request) -> Response:
        return Response(description, media_type="application/json")

    async def show_page(request: Request) -> Response:
        name = request.url.path.rpartition("/")[2]
        return Response(pages[name], media_type=_PAGE[name], headers={"cache-control": "no-cache"})

    return [
        *(operation.route(context) for operation in OPERATIONS),
        Route("/openapi.json", describe_api),
        *(Route(f"/{name}", show_page) for name in _PAGE),
    ]
