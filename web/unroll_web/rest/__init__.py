"""The REST API."""

from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from unroll_web.context import Context
from unroll_web.rest.models import model_routes


def routes(context: Context) -> list[BaseRoute]:
    """Returns the routes of the REST API."""
    return [Route("/healthz", _alive), *model_routes(context)]


async def _alive(_: object) -> Response:
    """Answers while the web process runs, also while no server does."""
    return Response("ok", media_type="text/plain")
