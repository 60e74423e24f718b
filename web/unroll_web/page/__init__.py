"""The page that shows a network thinking."""

from starlette.routing import BaseRoute

from unroll_web.context import Context


def routes(context: Context) -> list[BaseRoute]:
    """Returns the routes of the page."""
    return []
