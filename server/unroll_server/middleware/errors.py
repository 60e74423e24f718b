"""The outermost layer of every call: errors become statuses, and the call is reported."""

import asyncio
import logging
import time
from functools import lru_cache
from typing import Any

import grpc
import grpc.aio

from unroll_engine.errors import InternalError, OverloadedError, RequestError
from unroll_server import caller
from unroll_server.middleware import Behavior, CallContext, Method
from unroll_server.middleware.access_log import REQUEST_ID, MethodObserver
from unroll_server.status import DETAILS, PUSHBACK, STATUS, status_of

_log = logging.getLogger(__name__)

_UNKNOWN: int = grpc.StatusCode.UNKNOWN.value[0]


def with_status(method: Method, observer: MethodObserver) -> Behavior:
    """Returns a behavior that ends a call with the status of the error that it raised, and reports the call.

    Args:
        method: The method inside all its middleware.
        observer: Reports every call.
    """
    behavior, counts, reports_calls = method.behavior, observer.counts, observer.reports_calls

    async def run(request: Any, context: CallContext) -> Any:
        counts.started()
        call = caller.current.get()
        begin = time.perf_counter() - call.waited
        report = observer.open(call, context) if reports_calls else None
        if call.request_id:
            context.set_trailing_metadata(((REQUEST_ID, call.request_id),))
        code = _UNKNOWN
        try:
            try:
                response = await behavior(request, context)
                code = _code_of(context) if context.code() else 0
                return response
            except Exception as error:
                await _abort(error, context, method.path)
        except asyncio.CancelledError:
            code = _cancelled_code(context)
            raise
        except grpc.aio.AbortError:
            code = _code_of(context)
            raise
        finally:
            seconds = time.perf_counter() - begin
            # Streams count their messages one by one.
            messages = (0, 0) if method.response_streaming else (call.received, call.sent)
            counts.handled(code, seconds, *messages, call.trace)
            if report:
                report.end(code, seconds)

    return run


def _code_of(context: CallContext) -> int:
    """Returns the number of a call's status."""
    code = context.code()
    number: int = code.value[0] if isinstance(code, grpc.StatusCode) else code
    return number


def _cancelled_code(context: CallContext) -> int:
    """Returns the status number of a call that was cancelled by its deadline or its caller."""
    remaining = context.time_remaining()
    late = remaining is not None and remaining <= 0
    code = grpc.StatusCode.DEADLINE_EXCEEDED if late else grpc.StatusCode.CANCELLED
    number: int = code.value[0]
    return number


async def _abort(error: Exception, context: CallContext, path: str) -> None:
    if isinstance(error, grpc.aio.AbortError):
        raise error
    if not isinstance(error, RequestError):
        _log.error("%s failed", path, exc_info=error)
        error = InternalError("the server failed; its log has the cause")
    trailers: list[tuple[str, str | bytes]]
    if isinstance(error, OverloadedError):
        trailers = list(refusal_trailers(error.description, error.retry_after, error.reason))
    else:
        trailers = [(DETAILS, status_of(error).SerializeToString())]
    if request_id := caller.current.get().request_id:
        trailers.append((REQUEST_ID, request_id))
    await context.abort(STATUS[type(error)], str(error), tuple(trailers))


@lru_cache(1024)
def refusal_trailers(description: str, retry_after: float, reason: str) -> tuple[tuple[str, str | bytes], ...]:
    """Returns the trailers of a refusal; cached, since an overloaded server refuses many calls alike."""
    status = status_of(OverloadedError(description, retry_after, reason))
    return (DETAILS, status.SerializeToString()), (PUSHBACK, str(round(retry_after * 1000)))
