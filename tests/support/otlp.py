"""A receiver of traces: OpenTelemetry's service on a free loopback port."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as pb
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as pb_grpc
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from support.processes import PATIENCE


class Receiver(pb_grpc.TraceServiceServicer):
    """Keeps every received span.

    Attributes:
        environment: Variables that make a process send its spans here, at once.
    """

    def __init__(self) -> None:
        self._spans: list[tuple[str, Span]] = []
        self._came = threading.Condition()
        self._server = grpc.server(ThreadPoolExecutor(2))
        pb_grpc.add_TraceServiceServicer_to_server(self, self._server)  # type: ignore[no-untyped-call]  # it ships no types
        port = self._server.add_insecure_port("127.0.0.1:0")
        self.environment = {
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{port}",
            "OTEL_BSP_SCHEDULE_DELAY": "50",
        }

    def Export(self, request: pb.ExportTraceServiceRequest, context: Any) -> pb.ExportTraceServiceResponse:  # noqa: N802
        """See TraceService."""
        with self._came:
            for resource in request.resource_spans:
                names = {pair.key: pair.value.string_value for pair in resource.resource.attributes}
                for scope in resource.scope_spans:
                    self._spans += [(names["service.name"], span) for span in scope.spans]
            self._came.notify_all()
        return pb.ExportTraceServiceResponse()

    def until(self, enough: Callable[[list[tuple[str, Span]]], bool]) -> list[tuple[str, Span]]:
        """Waits until the spans, each with its service's name, are enough."""
        deadline = time.monotonic() + PATIENCE
        with self._came:
            while not enough(self._spans):
                assert self._came.wait(deadline - time.monotonic()), [(name, span.name) for name, span in self._spans]
            return list(self._spans)

    def __enter__(self) -> Self:
        self._server.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.stop(None).wait()
