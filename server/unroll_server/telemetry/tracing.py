"""Spans of calls, queues and ticks, by OpenTelemetry, if an endpoint for them is configured.

The environment is OpenTelemetry's own: OTEL_EXPORTER_OTLP_ENDPOINT, OTEL_TRACES_SAMPLER, OTEL_SERVICE_NAME, ...:
https://opentelemetry.io/docs/specs/otel/configuration/sdk-environment-variables/. Without an endpoint nothing of it is
imported. No span holds values, states, tokens, or ids of sessions.
"""

import os
import re
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

from unroll_server.errors import StartupError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Span

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
SERVICE_NAME = "unroll-server"
"""Name of the service if OTEL_SERVICE_NAME is not set."""
MAX_LINKS = 128
"""Links of a span: OpenTelemetry's default limit."""
MAX_TICKS = 1000
"""Most spans of ticks for a call: a stream can live for days."""
FLUSH_SECONDS = 3.0
"""Most seconds for sending the remaining spans at the end."""
LEAST_STEP = 1_000_000
"""Nanoseconds; smaller changes between wall and monotonic clock come from the time between two readings."""
TRACEPARENT = "traceparent"
"""Metadata with the caller's trace context: https://www.w3.org/TR/trace-context/."""
_TRACEPARENT = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(?:-.*)?")


class Tracer:
    """Makes spans and sends them on a separate thread.

    Args:
        provider: Provider of OpenTelemetry.
        exporter: Sends the spans.
    """

    def __init__(self, provider: "TracerProvider", exporter: "SpanExporter") -> None:
        from opentelemetry import trace
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = provider
        self._exporter = exporter
        self._tracer = provider.get_tracer("unroll_server")
        self._kind = trace.SpanKind.SERVER
        self._propagator = TraceContextTextMapPropagator()
        self._to_wall = 0

    @classmethod
    def configured(cls) -> Self | None:
        """Returns the tracer that the environment configures; None if it configures none.

        Raises:
            StartupError: OpenTelemetry is not installed, or refuses the configuration.
        """
        if (
            not any(map(os.environ.get, _ENDPOINTS))
            or os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true"
            or os.environ.get("OTEL_TRACES_EXPORTER", "otlp").strip().lower() == "none"
        ):
            return None
        try:
            from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import SERVICE_NAME as NAME
            from opentelemetry.sdk.resources import OTELResourceDetector, Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ModuleNotFoundError:
            variable = next(filter(os.environ.get, _ENDPOINTS))
            raise StartupError(f"{variable}: OpenTelemetry is missing; install unroll-server[otel]") from None
        try:
            given = OTELResourceDetector().detect()
            resource = Resource.create({NAME: SERVICE_NAME}).merge(given)
            provider = TracerProvider(resource=resource, shutdown_on_exit=False)
            exporter = OTLPSpanExporter()
            provider.add_span_processor(BatchSpanProcessor(exporter))
        except Exception as error:
            # It refuses some values of the environment, each with a different exception.
            raise StartupError(f"OTEL_...: OpenTelemetry can't be set up as the environment says: {error}") from error
        return cls(provider, exporter)

    def call(self, path: str, metadata: Mapping[str, str]) -> "CallSpan | None":
        """Starts the span of a call; returns None if it is not sampled.

        Args:
            path: `/package.Service/Method`.
            metadata: Metadata of the caller, with `traceparent` and `tracestate` if it traces.
        """
        service, _, method = path[1:].partition("/")
        to_wall = self._wall_difference()
        span = self._tracer.start_span(
            path[1:],
            self._propagator.extract(metadata),
            self._kind,
            {"rpc.system": "grpc", "rpc.service": service, "rpc.method": method},
            start_time=time.monotonic_ns() + to_wall,
        )
        return CallSpan(self, span, to_wall) if span.is_recording() else None

    def _wall_difference(self) -> int:
        """Returns the difference from `time.monotonic_ns` to nanoseconds since 1970, constant until the clock steps."""
        difference = time.time_ns() - time.monotonic_ns()
        if abs(difference - self._to_wall) > LEAST_STEP:
            self._to_wall = difference
        return self._to_wall

    def child(
        self,
        parent: "Span",
        name: str,
        begin: int,
        end: int,
        attributes: Mapping[str, str | int | float],
        links: Iterable["Span"] = (),
    ) -> "Span":
        """Returns a span that has ended, from `begin` to `end` in nanoseconds since 1970."""
        from opentelemetry import trace

        span = self._tracer.start_span(
            name,
            trace.set_span_in_context(parent),
            attributes=attributes,
            links=[trace.Link(link.get_span_context()) for link in links],
            start_time=begin,
        )
        span.end(end)
        return span

    def close(self) -> None:
        """Sends the remaining spans, for FLUSH_SECONDS at most, and ends."""
        # OpenTelemetry's timeouts do not apply while an exporter retries; shutting it down ends the retries.
        give_up = threading.Timer(FLUSH_SECONDS, self._exporter.shutdown)
        give_up.daemon = True
        give_up.start()
        self._provider.shutdown()
        give_up.cancel()


class CallSpan:
    """The trace of a call; see unroll_engine.observer.Trace.

    Args:
        tracer: Makes its spans.
        span: Span of the call, just started.
        to_wall: Nanoseconds from `time.monotonic_ns` to the time since 1970. Read once: a step of the wall clock within
            the call would give spans that end before they begin.
    """

    __slots__ = ("_span", "_ticks", "_to_wall", "_tracer", "ids")

    def __init__(self, tracer: Tracer, span: "Span", to_wall: int) -> None:
        self._tracer = tracer
        self._span = span
        self._ticks = 0
        self._to_wall = to_wall
        context = span.get_span_context()
        self.ids = context.trace_id.to_bytes(16) + context.span_id.to_bytes(8)

    def waited(self, model: str, seconds: float) -> None:
        """Records that a job of the call was queued for `seconds`, until now."""
        if self._ticks >= MAX_TICKS:
            return
        now = time.monotonic_ns() + self._to_wall
        self._tracer.child(self._span, "unroll.queue", now - int(max(seconds, 0.0) * 1e9), now, _model(model))

    def ticked(
        self, others: Sequence["CallSpan"], model: str, lanes: int, steps: int, real_steps: int, seconds: float
    ) -> None:
        """Records a tick, ended now, that ran jobs of this call and of others.

        A span belongs to one trace, so each call gets a span of the tick. The first one links to the other calls, and
        theirs link to the first one.
        """
        told = [call for call in (self, *others) if call._is_told()]
        if not told:
            return
        end = time.monotonic_ns()
        begin = end - int(seconds * 1e9)
        what = {**_model(model), "unroll.lanes": lanes, "unroll.steps": steps, "unroll.real_steps": real_steps}
        links = [other._span for other in told[1 : MAX_LINKS + 1]]
        first = told[0]._tick(begin, end, what, links)
        for other in told[1:]:
            other._tick(begin, end, what, [first])

    def _tick(self, begin: int, end: int, what: Mapping[str, str | int | float], links: Iterable["Span"]) -> "Span":
        to_wall = self._to_wall
        return self._tracer.child(self._span, "unroll.tick", begin + to_wall, end + to_wall, what, links)

    def _is_told(self) -> bool:
        self._ticks += 1
        return self._ticks <= MAX_TICKS

    def end(self, code: int, attributes: Mapping[str, str | int]) -> None:
        """Ends the call's span.

        Args:
            code: Number of the call's status.
            attributes: Further attributes of the span.
        """
        from opentelemetry.trace import Status, StatusCode

        self._span.set_attributes({**attributes, "unroll.ticks": self._ticks, "rpc.grpc.status_code": code})
        if code in _SERVER_FAULTS:
            self._span.set_status(Status(StatusCode.ERROR))
        self._span.end(time.monotonic_ns() + self._to_wall)


class CallerTrace:
    """The trace of a call that the caller records and the server does not; see unroll_engine.observer.Trace.

    Args:
        ids: Ids of the trace and of the caller's span.
    """

    __slots__ = ("ids",)

    def __init__(self, ids: bytes) -> None:
        self.ids = ids

    @classmethod
    def of(cls, traceparent: str) -> Self | None:
        """Returns the trace of a `traceparent`; None if it is malformed, or not sampled."""
        found = _TRACEPARENT.fullmatch(traceparent)
        return cls(bytes.fromhex(found[1] + found[2])) if found and int(found[3], 16) & 1 else None

    def waited(self, model: str, seconds: float) -> None:
        """See Trace."""

    def ticked(
        self, others: Sequence[Any], model: str, lanes: int, steps: int, real_steps: int, seconds: float
    ) -> None:
        """See Trace."""


_SERVER_FAULTS = frozenset({2, 4, 12, 13, 14, 15})
"""Codes that are errors of a server's span: https://opentelemetry.io/docs/specs/semconv/rpc/grpc/."""


def _model(key: str) -> dict[str, str | int | float]:
    name, _, version = key.rpartition("/")
    return {"unroll.model": name, "unroll.version": int(version)}
