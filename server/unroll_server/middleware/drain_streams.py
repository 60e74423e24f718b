"""Ends the streams that would never end on their own, once the server drains."""

import asyncio
from typing import Any

from unroll_server.errors import DrainingError
from unroll_server.middleware import Behavior, CallContext, Method


class DrainStreams:
    """Ends health watchers and reflection streams when the server drains, which would otherwise wait for them.

    Args:
        services: Full names of the services whose streams drain on their own.
    """

    def __init__(self, *services: str) -> None:
        self._prefixes = tuple(f"/{service}/" for service in services)
        self._open: set[asyncio.Timeout] = set()

    def end(self, seconds: float) -> None:
        """Ends the open streams after a number of seconds, in which they can send a last message."""
        for timeout in self._open:
            timeout.reschedule(asyncio.get_running_loop().time() + seconds)

    def wrap(self, method: Method) -> Behavior:
        """See Middleware."""
        behavior = method.behavior
        if not method.response_streaming or method.path.startswith(self._prefixes):
            return behavior

        async def call(request: Any, context: CallContext) -> None:
            timeout = asyncio.timeout(None)
            self._open.add(timeout)
            try:
                async with timeout:
                    await behavior(request, context)
            except TimeoutError:
                raise DrainingError("the rest of this call") from None
            finally:
                self._open.remove(timeout)

        return call
