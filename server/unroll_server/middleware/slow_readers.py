"""Bounds the answers that wait for callers who do not read them: a slow reader costs itself alone."""

import inspect
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import Message

from unroll_engine.errors import OverloadedError
from unroll_server import caller
from unroll_server.telemetry.metrics import Metrics

SMALL = 4 * 1024
"""Bytes of an answer that is not counted: `--max-concurrent-calls` of them are no danger."""
OF_CONNECTION = 64 * 2**20
"""Bytes of answers that wait on one connection, at most; a single larger answer may."""
IN_ALL = 512 * 2**20
"""Bytes of answers that wait, at most, beyond one answer of each connection."""
REASON = "UNREAD_ANSWERS"
RETRY_AFTER = 1.0
"""Seconds after which a caller that has not read its answers may ask again."""


class UnreadInterceptor(grpc.aio.ServerInterceptor):
    """Refuses calls of a connection while too many answers wait on it to be read.

    A caller with one call at a time is never refused. Streams bound themselves: see api/native/stream.py.

    Args:
        metrics: Counts refusals.
    """

    per_method = True
    """True: the result depends on the method alone, so that `Registry` asks once a method."""

    def __init__(self, metrics: Metrics) -> None:
        self._figures = metrics.server
        self._waiting: Counter[str] = Counter()
        self._total = 0

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """See grpc.aio.ServerInterceptor."""
        handler = await continuation(handler_call_details)
        for kind in ("unary_unary", "stream_unary"):
            behavior = getattr(handler, kind, None)
            if inspect.iscoroutinefunction(behavior):
                return handler._replace(**{kind: self._bounded(behavior)})
        return handler

    def _bounded(self, behavior: Callable[[Any, Any], Awaitable[Any]]) -> Callable[[Any, Any], Awaitable[Any]]:
        async def call(request: Any, context: Any) -> Any:
            if self._waiting:
                self._check(context.peer(), 0)
            response = await behavior(request, context)
            if isinstance(response, Message) and (size := response.ByteSize()) >= SMALL:
                self._hold(context, size)
            return response

        return call

    def _check(self, connection: str, size: int) -> None:
        waiting = self._waiting.get(connection, 0)
        if waiting and (waiting + size > OF_CONNECTION or self._total + size > IN_ALL):
            problem = f"{waiting} bytes of answers wait to be read on this connection"
            self._figures.refused("unread")
            raise OverloadedError(problem, RETRY_AFTER, REASON)

    def _hold(self, context: Any, size: int) -> None:
        """Counts an answer until it is read, or nobody is there to read it."""
        connection: str = context.peer()
        # Again, now that the size is known: many calls may have begun when nothing waited yet. But whoever is refused
        # takes it that nothing was done, and asks again.
        if not caller.lasting.get():
            self._check(connection, size)
        self._waiting[connection] += size
        self._total += size

        def read(_: Any) -> None:
            self._total -= size
            self._waiting[connection] -= size
            if not self._waiting[connection]:
                del self._waiting[connection]

        context.add_done_callback(read)
