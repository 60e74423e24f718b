"""The application: the routes of the REST API and of the page, behind the gate."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware

from unroll_client import UnrollError
from unroll_web import page, problems, rest
from unroll_web.context import REQUEST_ID, Context
from unroll_web.gate import Gate
from unroll_web.problems import Problem
from unroll_web.settings import Settings


def create_app(settings: Settings) -> Starlette:
    """Makes the application; its `state.context` is its Context."""
    context = Context(settings)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        await context.close()

    handled = (Problem, UnrollError, HTTPException)
    app = Starlette(
        routes=[*rest.routes(context), *page.routes(context)],
        middleware=[Middleware(Gate, context), *_cors(settings)],
        exception_handlers=dict.fromkeys(handled, problems.answer),
        lifespan=lifespan,
    )
    # A redirect would name whatever host the request names.
    app.router.redirect_slashes = False
    app.state.context = context
    return app


def _cors(settings: Settings) -> list[Middleware]:
    """Returns the middleware that lets pages of the allowed origins read answers; none by default."""
    if not settings.origins:
        return []
    return [
        Middleware(
            CORSMiddleware,
            allow_origins=sorted(settings.origins),
            allow_methods=("GET", "POST"),
            allow_headers=("authorization", "inference-header-content-length", "traceparent", "tracestate", REQUEST_ID),
            expose_headers=("inference-header-content-length", "retry-after", REQUEST_ID),
        )
    ]
