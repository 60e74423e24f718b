"""The front for ASGI servers that know HTTP/2 and trailers: the servicers of grpc.aio without grpc's own server."""

import asyncio
import logging
import re
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress

import grpc
import grpc.aio

from unroll_server import calls
from unroll_server.calls import take_request_id
from unroll_server.fronts.asgi_call import Call, Receive, Send, piece
from unroll_server.fronts.asgi_context import Event
from unroll_server.fronts.asgi_methods import Method, Methods
from unroll_server.fronts.asgi_serve import serve
from unroll_server.fronts.asgi_streams import HIGH_WATER
from unroll_server.fronts.gate import Gate
from unroll_server.fronts.grpc_wire import ACCEPT_ENCODING, CODECS, WireError, decode_metadata, seconds_of

_log = logging.getLogger(__name__)

REQUEST_ID = calls.REQUEST_ID.encode()
_GRPC = re.compile(rb"application/grpc(\+proto)?[ \t]*(;.*)?", re.IGNORECASE)
LOOK = 0.025
"""Seconds between two looks whether the callers are still there."""
LOOKS = 64
"""Callers that are looked for at once. The longest unseen go first, so that looking costs the same at any load."""


class AsgiFront:
    """An ASGI 3 application of scope `http` that serves gRPC.

    Args:
        interceptors: What stands before every handler, outermost first; see `Registry`.
        max_message_bytes: The largest request message; a larger one is RESOURCE_EXHAUSTED.
        gate: Told of calls, where what runs this refuses some by itself.

    Attributes:
        registry: What the generated `add_...Servicer_to_server` functions take.
    """

    def __init__(
        self, interceptors: Sequence[grpc.aio.ServerInterceptor], max_message_bytes: int, gate: Gate | None = None
    ) -> None:
        self.registry = Methods(interceptors, gate)
        self._gate = gate
        self._limit = max_message_bytes
        # Those looked for longest ago come first.
        self._calls: OrderedDict[Call, None] = OrderedDict()
        self._round = 0
        self._looking = False
        self._stopping = False
        self._idle = asyncio.Event()

    async def __call__(self, scope: Event, receive: Receive, send: Send) -> None:
        """Serves a request; see the ASGI specification, HTTP."""
        if scope["type"] != "http":
            raise ValueError(f"a scope of type {scope['type']}, http expected")
        headers = dict(scope["headers"])
        raw = scope.get("raw_path")
        if scope.get("query_string") or (raw and raw != scope["path"].encode()):
            scope["path"] = _path_as_sent(scope)
        gate = self._gate
        counts = gate is not None and gate.enter(scope["path"])
        call = Call(scope, headers, receive, send)
        call.round = self._round
        self._calls[call] = None
        if not self._looking:
            self._looking = True
            call.loop.call_later(LOOK, self._look, call.loop)
        try:
            method = self.registry.resolved.get(scope["path"])
            if (
                method is None
                or self._stopping
                or scope["method"] != "POST"
                or headers.get(b"content-type") != b"application/grpc"
                or b"te" not in headers
            ):
                method = await self._admit(call)
                if method is None:
                    return
            if method.unread and self.registry.strained():
                method = method.unread
            if (name := headers.get(REQUEST_ID)) is not None:
                take_request_id(name)
            if method.calls:
                call.heard = method.calls.open(call)
            if (encoding := headers.get(b"grpc-encoding", b"identity")) != b"identity":
                if encoding not in CODECS:
                    problem = f"grpc-encoding {encoding.decode('latin-1')}; {ACCEPT_ENCODING.decode()} are known"
                    raise WireError(grpc.StatusCode.UNIMPLEMENTED, problem)
                call.codec = encoding
            if (timeout := headers.get(b"grpc-timeout")) is not None:
                call.deadline = call.loop.time() + seconds_of(timeout)
            await serve(call, method, self._limit)
        except asyncio.CancelledError:
            if not call.ended_by:
                raise
            await _end(call, *call.ended_by)
        except grpc.aio.AbortError:
            await _finish(call)
        except WireError as error:
            await _end(call, error.code, error.details)
        except Exception as error:
            if call.ended_by:
                await _end(call, *call.ended_by)
            elif not (call.over and isinstance(error, OSError)):
                _log.exception("%s raised", scope["path"])
                call.set_code_unless_bad(grpc.StatusCode.UNKNOWN)
                call.set_details(f"Unexpected {type(error)}: {error}")
                await _finish(call)
        finally:
            del self._calls[call]
            call.close()
            if gate and counts:
                gate.leave(scope["path"], answered=call.code() is grpc.StatusCode.OK and not call.ended_by)
            if self._stopping and not self._calls:
                self._idle.set()

    async def stop(self, grace: float) -> None:
        """Takes no new calls, waits for those in flight, and cancels what is not done after `grace` seconds."""
        self._stopping = True
        if not self._calls:
            return
        try:
            async with asyncio.timeout(grace):
                await self._idle.wait()
        except TimeoutError:
            for call in list(self._calls):
                call.end_with(grpc.StatusCode.UNAVAILABLE, "the server is shutting down")
            await self._idle.wait()

    async def _admit(self, call: Call) -> Method | None:
        """The method of a call that is not the usual one; None where it is no gRPC, and answered so.

        Raises:
            WireError: it can't be answered.
        """
        scope, content_type = call.scope, call.headers.get(b"content-type", b"")
        if scope["method"] != "POST":
            await _refuse(call, 405, [(b"allow", b"POST")])
            return None
        if not _GRPC.fullmatch(content_type):
            await _refuse(call, 415, [(b"accept", b"application/grpc")])
            return None
        if b"te" not in call.headers:
            # A server of HTTP sends none then, and an answer would have no status.
            raise WireError(grpc.StatusCode.INTERNAL, "te: trailers expected among the headers")
        if self._stopping:
            raise WireError(grpc.StatusCode.UNAVAILABLE, "the server is shutting down")
        path: str = scope["path"]
        method = self.registry.resolved.get(path) or await self.registry.find(path, decode_metadata(scope["headers"]))
        if method is None:
            raise WireError(grpc.StatusCode.UNIMPLEMENTED, "Method not found!")
        return method

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        """Asks the transport for word of the callers who have said all they had to say.

        An ASGI server may tell at once that such a caller has left; Envoy's tells when it is asked.
        """
        if not self._calls:
            self._looking = False
            return
        loop.call_later(LOOK, self._look, loop)
        self._round += 1
        for _ in range(min(LOOKS, len(self._calls))):
            call = next(iter(self._calls))
            if call.round > self._round - 2:
                break
            call.round = self._round
            self._calls.move_to_end(call)
            if call.receiving:
                continue
            if call.watched or (call.requests and call.requests.unread < HIGH_WATER):
                call.pull()
            elif call.requests and call.responses:
                # To ask for more than its servicer takes would fill the memory.
                call.responses.probe()


def _path_as_sent(scope: Event) -> str:
    """The path with its escapes and its query, by which no method is found: gRPC knows neither.

    What tells calls by their paths before they come here, Envoy's filter among it, sees it so.
    """
    raw, query = scope.get("raw_path") or scope["path"].encode(), scope.get("query_string")
    return f"{raw.decode('latin-1')}?{query.decode('latin-1')}" if query else str(raw.decode("latin-1"))


async def _finish(call: Call) -> None:
    """Ends a call with what its servicer left."""
    with suppress(OSError):
        await (call.responses.finish() if call.responses else call.finish(b""))


async def _end(call: Call, code: grpc.StatusCode, details: str) -> None:
    """Ends a call with a status that is not its servicer's."""
    with suppress(OSError):
        await call.fail(code, details)


async def _refuse(call: Call, status: int, headers: list[tuple[bytes, bytes]]) -> None:
    """Answers what is no gRPC request."""
    call.over = True
    with suppress(OSError):
        await call.send({"type": "http.response.start", "status": status, "headers": headers})
        await call.send(piece(b"", False))
