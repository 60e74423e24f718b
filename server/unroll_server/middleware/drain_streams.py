"""Ends calls that never end by themselves when the server drains."""

import asyncio
import inspect
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from typing import Any

import grpc
import grpc.aio

from unroll_server.errors import DrainingError


class EndlessCalls(grpc.aio.ServerInterceptor):
    """Ends, when the server drains, the streams that never end by themselves: health watchers, reflection.

    Without it a drain would wait for them as long as it may.

    Args:
        services: Full names of the services whose calls do end; they are left alone.
    """

    per_method = True
    """True: the result depends on the method alone, so that `Registry` asks once a method."""

    def __init__(self, *services: str) -> None:
        self._prefixes = tuple(f"/{service}/" for service in services)
        self._open: set[asyncio.Timeout] = set()

    def end(self, seconds: float) -> None:
        """Ends the open calls after so many seconds, in which they can send a last message."""
        for timeout in self._open:
            timeout.reschedule(asyncio.get_running_loop().time() + seconds)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """See grpc.aio.ServerInterceptor."""
        handler = await continuation(handler_call_details)
        if handler is None or handler_call_details.method.startswith(self._prefixes):
            return handler
        if inspect.iscoroutinefunction(handler.unary_stream):
            return handler._replace(unary_stream=self._bounded_writer(handler.unary_stream))
        if inspect.isasyncgenfunction(handler.stream_stream):
            return handler._replace(stream_stream=self._bounded_generator(handler.stream_stream))
        return handler

    def _bounded_writer(self, behavior: Callable[[Any, Any], Awaitable[None]]) -> Callable[[Any, Any], Awaitable[None]]:
        async def call(request: Any, context: Any) -> None:
            async with self._bounded():
                await behavior(request, context)

        return call

    def _bounded_generator(
        self, behavior: Callable[[Any, Any], AsyncGenerator[Any, None]]
    ) -> Callable[[Any, Any], AsyncIterator[Any]]:
        async def call(requests: Any, context: Any) -> AsyncIterator[Any]:
            async with self._bounded(), aclosing(behavior(requests, context)) as responses:
                async for response in responses:
                    yield response

        return call

    @asynccontextmanager
    async def _bounded(self) -> AsyncIterator[None]:
        timeout = asyncio.timeout(None)
        self._open.add(timeout)
        try:
            async with timeout:
                yield
        except TimeoutError:
            raise DrainingError("the rest of this call") from None
        finally:
            self._open.remove(timeout)
