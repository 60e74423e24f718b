"""Runs a method's behavior for a call: one request or many, one response or many, on the loop or in a thread."""

from typing import Any

import grpc

from unroll_server.fronts.asgi_call import Call
from unroll_server.fronts.asgi_context import Event
from unroll_server.fronts.asgi_methods import Method
from unroll_server.fronts.asgi_streams import Requests, Responses
from unroll_server.fronts.asgi_threads import ThreadedCall, pull, run
from unroll_server.fronts.grpc_wire import HEADER_BYTES, FrameReader, WireError


async def serve(call: Call, method: Method, limit: int) -> None:
    """Reads what the method takes, runs it, and sends what it answers.

    Args:
        call: The call.
        method: Its method.
        limit: The largest request message in bytes.

    Raises:
        WireError: the request breaks the protocol or the limit, or its deadline has passed.
    """
    call.begin()
    if method.many_requests:
        call.requests = request = Requests(call, method.deserialize, limit)
    else:
        event = await call.receive()
        message = _whole_message(event, limit)
        if message is None:
            message = await _only_message(call, event, limit)
        if call.ended_by:
            # Its deadline passed, or the server stops: it is answered.
            return
        if message is None:
            call.over = True
            call.ended_by = (grpc.StatusCode.CANCELLED, "the caller left")
            return
        call.watched = True
        request = method.deserialize(message)
    try:
        if method.many_responses:
            await _answer_many(call, method, request)
            return
        if method.is_async:
            response = await method.behavior(request, call)
        else:
            response = await run(method.behavior, _for_thread(request), ThreadedCall(call))
        # A status other than OK takes the place of the response.
        good = call.code() is grpc.StatusCode.OK
        await call.finish(call.frame(method.serialize(response)) if good else b"")
    except Exception as error:
        if not method.on_error or call.over:
            raise
        await method.on_error(error, call)


async def _answer_many(call: Call, method: Method, request: Any) -> None:
    call.responses = responses = Responses(call, method.serialize)
    if method.yields:
        await responses.drain(method.behavior(request, call))
    elif method.is_async:
        await method.behavior(request, call)
    else:
        produced = await run(method.behavior, _for_thread(request), ThreadedCall(call))
        await responses.drain(pull(iter(produced)))
    await responses.finish()


def _for_thread(request: Any) -> Any:
    return request.in_thread() if isinstance(request, Requests) else request


def _whole_message(event: Event, limit: int) -> bytes | None:
    """The message of a request that came in one piece, uncompressed, as nearly every one does; None for any other."""
    body: bytes = event.get("body", b"")
    if event.get("more_body") or len(body) < HEADER_BYTES or body[0]:
        return None
    size = len(body) - HEADER_BYTES
    return body[HEADER_BYTES:] if size <= limit and size == int.from_bytes(body[1:HEADER_BYTES], "big") else None


async def _only_message(call: Call, event: Event, limit: int) -> bytes | None:
    """The message of a call that has one; None where the caller left before it was whole.

    Args:
        call: The call.
        event: ASGI's first of the request.
        limit: The largest message in bytes.

    Raises:
        WireError: UNIMPLEMENTED where it has none or several, or the message breaks the protocol or the limit.
    """
    reader = FrameReader(limit, call.codec)
    while event["type"] != "http.disconnect":
        reader.feed(event.get("body", b""))
        if len(reader.messages) > 1 or not event.get("more_body"):
            break
        event = await call.receive()
    else:
        return None
    if reader.waiting and len(reader.messages) < 2:
        raise WireError(grpc.StatusCode.INTERNAL, "the request ends within a message")
    if len(reader.messages) != 1:
        raise WireError(grpc.StatusCode.UNIMPLEMENTED, "this method takes exactly one request")
    return reader.messages[0]
