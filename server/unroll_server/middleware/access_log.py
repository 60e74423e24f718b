"""What is told of every call: figures always; a log line and a span where somebody asked for them."""

import logging
import re
import time
import uuid
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import grpc
from google.protobuf.message import Message

from unroll_engine.observer import ObservedCall
from unroll_server import caller
from unroll_server.telemetry.metrics import CallMetrics, Metrics
from unroll_server.telemetry.tracing import CallSpan, Tracer

_log = logging.getLogger("unroll_server.access")

REQUEST_ID = "x-request-id"
"""The caller's metadata that names a call, and the trailer that gives the name back."""
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


def take_request_id(value: str | bytes | None) -> None:
    """Notes what the caller calls its call, if it does so in 1 to 128 printable characters of ASCII; else nothing."""
    if value is not None:
        name = value.decode("latin-1") if isinstance(value, bytes) else value
        caller.request_id.set(name if _ID.fullmatch(name) else "")


def _name_call() -> str:
    """What the call is called, from now on: by its caller, else by us."""
    name = caller.request_id.get() or uuid.uuid4().hex
    caller.request_id.set(name)
    return name


class Calls:
    """Hears of every call.

    Args:
        metrics: Where they are counted.
        access_log: Whether each gets a line.
        tracer: What makes spans of them; None where nobody asks.
    """

    def __init__(self, metrics: Metrics, access_log: bool = False, tracer: Tracer | None = None) -> None:
        self.metrics = metrics
        self.access_log = access_log
        self.tracer = tracer
        self._methods: dict[str, Method] = {}
        if access_log:
            # Who asks for it gets it, whatever else is logged.
            _log.setLevel(logging.INFO)

    def method(self, path: str, handler: Any) -> "Method":
        """Who hears of the calls of a method.

        Args:
            path: `/package.Service/Method`.
            handler: A grpc.RpcMethodHandler.
        """
        if path not in self._methods:
            kind = _KINDS[bool(handler.request_streaming), bool(handler.response_streaming)]
            self._methods[path] = Method(self, path, self.metrics.method(path, kind))
        return self._methods[path]

    def close(self) -> None:
        """Sends what spans are left, for some seconds at most."""
        if self.tracer:
            self.tracer.close()

    def unknown(self, path: str) -> None:
        """A call of a method that there is not has come and ended."""
        figures = self.metrics.no_method()
        figures.started()
        figures.handled(_UNIMPLEMENTED, 0.0)
        if self.access_log:
            _name_call()
            _log.info("call", extra={"fields": {"method": path[:_LONGEST_PATH], "code": _NAMES[_UNIMPLEMENTED]}})


class Method:
    """Hears of the calls of one method. Made by `Calls.method`.

    Attributes:
        path: `/package.Service/Method`.
        figures: Where they are counted.
        access_log: Whether each gets a line.
        tracer: What makes spans of them; None for nobody.
        open: Begins a call, given its grpc.aio.ServicerContext; `Call.end` is to be called at its end, in the same
            task. The request's id, where it has one, goes into the trailers.
    """

    def __init__(self, calls: Calls, path: str, figures: CallMetrics) -> None:
        self.path = path
        self.figures = figures
        self.access_log = calls.access_log
        # Probes ask every few seconds, and have nothing to tell.
        self.tracer = None if path.startswith("/grpc.") else calls.tracer
        self._watches = bool(self.access_log or self.tracer)
        self.open: Callable[[Any], Call] = partial(WatchedCall if self._watches else Call, self)

    def open_in_thread(self, context: Any) -> "Call":
        """`open`, in a thread, which was not told the call's context and may still have that of another."""
        take_request_id(dict(context.invocation_metadata() or ()).get(REQUEST_ID, ""))
        return self.open(context)

    def reading(self, deserialize: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
        """`deserialize`, heard."""
        received = self.figures.received

        def counted(data: bytes) -> Any:
            received()
            return deserialize(data)

        def watched(data: bytes) -> Any:
            received()
            if call := _current():
                call.received += 1
                call.received_bytes += len(data)
            return deserialize(data)

        return watched if self._watches else counted

    def writing(self, serialize: Callable[[Any], bytes]) -> Callable[[Any], bytes]:
        """`serialize`, heard."""
        sent = self.figures.sent

        def counted(message: Any) -> bytes:
            sent()
            return serialize(message)

        def watched(message: Any) -> bytes:
            sent()
            data = serialize(message)
            if call := _current():
                call.sent += 1
                call.sent_bytes += len(data)
            return data

        return watched if self._watches else counted


class Call:
    """A call of which only figures are told."""

    __slots__ = ("_begin", "_ended", "method")

    def __init__(self, method: Method, context: Any) -> None:
        self.method = method
        self._ended = False
        if name := caller.request_id.get():
            context.set_trailing_metadata(((REQUEST_ID, name),))
        method.figures.started()
        self._begin = time.perf_counter()

    def end(self, code: int) -> float | None:
        """The call has ended with the status of this number; returns its seconds, None where that was known."""
        if self._ended:
            return None
        self._ended = True
        seconds = time.perf_counter() - self._begin
        self.method.figures.handled(code, seconds)
        return seconds

    def note(self, request: Any, response: Any = None) -> None:
        """Takes the one request, or the one response, of the call."""


class WatchedCall(Call):
    """A call that gets a line in the log, or a span, or both; see `observer.ObservedCall`.

    Attributes:
        request_id: The caller's name for it, or one of ours.
        received: Requests.
        received_bytes: Their size, uncompressed.
        sent: Responses.
        sent_bytes: Their size, uncompressed.
        steps: Timesteps that the engine was given for it.
    """

    __slots__ = ("_peer", "_span", "received", "received_bytes", "request_id", "sent", "sent_bytes", "steps")

    def __init__(self, method: Method, context: Any) -> None:
        self.request_id = _name_call()
        # Not at the end: a call of grpcio whose caller has left is freed by then, and asking it crashes the process.
        self._peer = context.peer() if method.access_log else ""
        self.received = self.received_bytes = self.sent = self.sent_bytes = self.steps = 0
        self._span: CallSpan | None = None
        if method.tracer:
            metadata = {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}
            self._span = method.tracer.call(method.path, metadata)
        caller.watched.set(self)
        super().__init__(method, context)

    @property
    def traced(self) -> bool:
        """Whether the call has a span."""
        return self._span is not None

    def waited(self, model: str, seconds: float) -> None:
        """See observer.ObservedCall."""
        if self._span:
            self._span.waited(model, seconds)

    def ticked(
        self,
        others: Sequence[ObservedCall],
        model: str,
        lanes: int,
        steps: int,
        real_steps: int,
        seconds: float,
    ) -> None:
        """See observer.ObservedCall."""
        spans = [call._span for call in others if isinstance(call, WatchedCall) and call._span]
        if self._span:
            self._span.ticked(spans, model, lanes, steps, real_steps, seconds)

    def note(self, request: Any, response: Any = None) -> None:
        """Takes the sizes of a call with one request or one response, where that was not read in its task."""
        if not self.received and isinstance(request, Message):
            self.received, self.received_bytes = 1, request.ByteSize()
        if not self.sent and isinstance(response, Message):
            self.sent, self.sent_bytes = 1, response.ByteSize()

    def end(self, code: int) -> float | None:
        """See Call."""
        seconds = super().end(code)
        if seconds is None:
            return None
        if self._span:
            self._span.end(code, {"unroll.request_id": self.request_id, "unroll.steps": self.steps})
        if self.method.access_log:
            fields = {
                "method": self.method.path,
                "code": _NAMES[code],
                "seconds": round(seconds, 6),
                "peer": self._peer,
                "received": self.received,
                "received_bytes": self.received_bytes,
                "sent": self.sent,
                "sent_bytes": self.sent_bytes,
                "steps": self.steps,
            }
            if self._span:
                fields["trace_id"] = self._span.trace_id
            _log.info("call", extra={"fields": fields})
        return seconds


def _current() -> WatchedCall | None:
    call = caller.watched.get()
    return call if isinstance(call, WatchedCall) else None


def code_of(context: Any) -> int:
    """The number of the status that a servicer has left in its context, 0 (OK) where it left none."""
    # That of grpcio's servicers in threads does not tell.
    code = context.code() if hasattr(context, "code") else None
    if isinstance(code, grpc.StatusCode):
        number: int = code.value[0]
        return number
    return code or 0


def cancelled_code(context: Any) -> int:
    """The number of the status of a call that was cancelled from outside: its deadline passed, or its caller left."""
    remaining = context.time_remaining()
    late = remaining is not None and remaining <= 0
    code = grpc.StatusCode.DEADLINE_EXCEEDED if late else grpc.StatusCode.CANCELLED
    number: int = code.value[0]
    return number
