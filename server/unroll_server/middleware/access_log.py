"""Reports of every call: metrics always, a log line and a trace if asked for."""

import logging
import re
import uuid

import grpc

from unroll_server.caller import Call
from unroll_server.middleware import CallContext
from unroll_server.telemetry.metrics import CallMetrics, Metrics
from unroll_server.telemetry.tracing import CallSpan, Tracer

_log = logging.getLogger("unroll_server.access")

REQUEST_ID = "x-request-id"
"""Metadata with the caller's id of a call, and the trailer that returns it."""
_ID = re.compile(r"[!-~]{1,128}")
_UNIMPLEMENTED: int = grpc.StatusCode.UNIMPLEMENTED.value[0]
_NAMES = {code.value[0]: code.name for code in grpc.StatusCode}
_LONGEST_PATH = 256
_KINDS = {
    (False, False): "unary",
    (True, False): "client_stream",
    (False, True): "server_stream",
    (True, True): "bidi_stream",
}


def checked_request_id(value: str | bytes) -> str:
    """Returns a caller's request id if it is 1 to 128 printable ASCII characters, else ""."""
    name = value.decode("latin-1") if isinstance(value, bytes) else value
    return name if _ID.fullmatch(name) else ""


class CallObserver:
    """Reports every call.

    Args:
        metrics: Counts the calls.
        access_log: True to log a line for each call.
        tracer: Makes a span of each call; None for no spans.
    """

    def __init__(self, metrics: Metrics, access_log: bool = False, tracer: Tracer | None = None) -> None:
        self._metrics = metrics
        self.access_log = access_log
        self.tracer = tracer
        if access_log:
            # Independent of the level of other logs.
            _log.setLevel(logging.INFO)

    def method(self, path: str, request_streaming: bool = False, response_streaming: bool = False) -> "MethodObserver":
        """Returns the observer of a method, `/package.Service/Method`."""
        counts = self._metrics.method(path, _KINDS[request_streaming, response_streaming])
        # Probes arrive every few seconds and are not worth a span.
        tracer = None if path.startswith("/grpc.") else self.tracer
        return MethodObserver(path, counts, self.access_log, tracer)

    def unknown_method(self, path: str, call: Call) -> None:
        """Reports a call of an unknown method, which is over already."""
        counts = self._metrics.no_method()
        counts.started()
        counts.handled(_UNIMPLEMENTED, 0.0)
        if self.access_log:
            call.request_id = call.request_id or uuid.uuid4().hex
            _log.info("call", extra={"fields": {"method": path[:_LONGEST_PATH], "code": _NAMES[_UNIMPLEMENTED]}})

    def close(self) -> None:
        """Sends the remaining spans, for a few seconds at most."""
        if self.tracer:
            self.tracer.close()


class MethodObserver:
    """Reports the calls of one method. Made by `CallObserver.method`.

    Attributes:
        path: `/package.Service/Method`.
        counts: The method's metrics.
        reports_calls: True if its calls are logged or traced; `open` need not be called if not.
    """

    def __init__(self, path: str, counts: CallMetrics, access_log: bool, tracer: Tracer | None) -> None:
        self.path = path
        self.counts = counts
        self.reports_calls = access_log or tracer is not None
        self._access_log = access_log
        self._tracer = tracer

    def open(self, call: Call, context: CallContext) -> "CallReport":
        """Begins the report of a call, in its task; assigns a request id if the caller gave none."""
        call.request_id = call.request_id or uuid.uuid4().hex
        # Read now: grpcio frees a call whose caller has left, and reading it at the end would crash the process.
        peer = context.peer() if self._access_log else None
        span: CallSpan | None = None
        if self._tracer:
            metadata = {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}
            span = call.trace = self._tracer.call(self.path, metadata)
        return CallReport(self.path, call, span, peer)


class CallReport:
    """The report of a call that is logged or traced. Made by `MethodObserver.open`."""

    __slots__ = ("_call", "_path", "_peer", "_span")

    def __init__(self, path: str, call: Call, span: CallSpan | None, peer: str | None) -> None:
        self._path = path
        self._call = call
        self._span = span
        self._peer = peer

    def end(self, code: int, seconds: float) -> None:
        """Ends the span and logs the line.

        Args:
            code: Number of the call's status.
            seconds: Its duration.
        """
        call, span = self._call, self._span
        if span:
            span.end(code, {"unroll.request_id": call.request_id, "unroll.steps": call.steps})
        if self._peer is None:
            return
        fields = {
            "method": self._path,
            "code": _NAMES[code],
            "seconds": round(seconds, 6),
            "peer": self._peer,
            "received": call.received,
            "received_bytes": call.received_bytes,
            "sent": call.sent,
            "sent_bytes": call.sent_bytes,
            "steps": call.steps,
        }
        if call.trace:
            fields["trace_id"] = call.trace.ids[:16].hex()
        _log.info("call", extra={"fields": fields})
