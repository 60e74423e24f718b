"""Spans of RPCs by OpenTelemetry, if the program has set it up or the environment names an endpoint.

The variables are OpenTelemetry's own: OTEL_EXPORTER_OTLP_ENDPOINT, OTEL_SERVICE_NAME, ... Otherwise OpenTelemetry is
not imported. A span holds the method and the status, never the content of messages.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Awaitable, Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeVar

import grpc
import grpc.aio

from unroll_proto.v1 import unroll_pb2 as pb

if TYPE_CHECKING:
    from opentelemetry.trace import Span, Tracer

CallT = TypeVar("CallT", bound=grpc.aio.Call)
Metadata = tuple[tuple[str, str], ...]

UNROLL = f"/{pb.DESCRIPTOR.services_by_name['UnrollService'].full_name}/Unroll"
SERVICE_NAME = "unroll-client"
"""The service's name where OTEL_SERVICE_NAME gives none."""
_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")


class Tracing(grpc.aio.UnaryUnaryClientInterceptor):
    """Makes the spans of RPCs; as an interceptor, those of RPCs with one request and one response.

    Args:
        tracer: OpenTelemetry's.
    """

    def __init__(self, tracer: Tracer) -> None:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._tracer = tracer
        self._propagator = TraceContextTextMapPropagator()

    async def intercept_unary_unary(
        self,
        continuation: Callable[[grpc.aio.ClientCallDetails, Any], Awaitable[Any]],
        client_call_details: grpc.aio.ClientCallDetails,
        request: Any,
    ) -> Any:
        """See grpc.aio.UnaryUnaryClientInterceptor."""
        method: str | bytes = client_call_details.method
        path = method.decode() if isinstance(method, bytes) else method
        given: Any = client_call_details.metadata or ()
        metadata, ended = self.begin(path, tuple(given))
        details = grpc.aio.ClientCallDetails(
            method=client_call_details.method,
            timeout=client_call_details.timeout,
            metadata=grpc.aio.Metadata(*metadata),
            credentials=client_call_details.credentials,
            wait_for_ready=client_call_details.wait_for_ready,
        )
        call = await continuation(details, request)
        call.add_done_callback(ended)
        return call

    def begin(self, path: str, metadata: Metadata) -> tuple[Metadata, Callable[[Any], None]]:
        """Begins the span of an RPC.

        Args:
            path: `/package.Service/Method`.
            metadata: Metadata of the RPC. A `traceparent` in it is the parent of the span, or else the current span is.

        Returns:
            The metadata, which tell the server of the span, and what ends it, given the ended call.
        """
        from opentelemetry import trace

        given = {key: value for key, value in metadata if key in self._propagator.fields}
        parent = self._propagator.extract(given) if "traceparent" in given else None
        service, _, method = path[1:].partition("/")
        attributes = {"rpc.system": "grpc", "rpc.service": service, "rpc.method": method}
        span = self._tracer.start_span(path[1:], parent, trace.SpanKind.CLIENT, attributes)
        more: dict[str, str] = {}
        self._propagator.inject(more, trace.set_span_in_context(span))
        kept = tuple(entry for entry in metadata if entry[0] not in given)
        return (*kept, *more.items()), lambda call: _end(span, call)


def _end(span: Span, call: Any) -> None:
    from opentelemetry.trace import Status, StatusCode

    code = _code_of(call)
    span.set_attribute("rpc.grpc.status_code", code.value[0])
    if code is not grpc.StatusCode.OK:
        span.set_status(Status(StatusCode.ERROR, code.name))
    span.end()


def _code_of(call: Any) -> grpc.StatusCode:
    # The call is over, so its status is known, though only a coroutine returns it.
    asking = call.code()
    try:
        asking.send(None)
    except StopIteration as done:
        code: grpc.StatusCode = done.value
        return code
    finally:
        asking.close()
    return grpc.StatusCode.UNKNOWN


def tracing() -> Tracing | None:
    """Returns the tracer; None if tracing is off or OpenTelemetry is not installed."""
    asked = any(map(os.environ.get, _ENDPOINTS)) and os.environ.get("OTEL_SDK_DISABLED", "").lower() != "true"
    if not asked and "opentelemetry.trace" not in sys.modules:
        return None
    try:
        from opentelemetry import trace
    except ModuleNotFoundError:
        return None
    provider = trace.get_tracer_provider()
    if not isinstance(provider, trace.ProxyTracerProvider):
        return Tracing(provider.get_tracer("unroll_client"))
    own = _own_tracer() if asked else None
    return None if own is None else Tracing(own)


@lru_cache(1)
def _own_tracer() -> Tracer | None:
    """A tracer that sends to where the environment says, until the process ends."""
    try:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import SERVICE_NAME as NAME
        from opentelemetry.sdk.resources import OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ModuleNotFoundError:
        return None
    resource = Resource.create({NAME: SERVICE_NAME}).merge(OTELResourceDetector().detect())
    provider = TracerProvider(resource=resource)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider.get_tracer("unroll_client")


def traced_stream(method: Callable[..., CallT], metadata: Metadata, wait_for_ready: bool) -> CallT:
    """Starts the RPC that carries a client's sequences, with a span from its beginning to its end.

    Args:
        method: Unroll of the stub.
        metadata: Metadata of the RPC.
        wait_for_ready: See `AsyncClient`.
    """
    if (traced := tracing()) is None:
        return method(metadata=metadata, wait_for_ready=wait_for_ready)
    own, ended = traced.begin(UNROLL, metadata)
    call = method(metadata=own, wait_for_ready=wait_for_ready)
    call.add_done_callback(ended)
    return call
