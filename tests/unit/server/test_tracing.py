"""Spans of calls, queueing and shared ticks, as exported."""

import asyncio
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from support.models import random_network, served

from unroll_engine.async_engine import AsyncEngine
from unroll_engine.jobs import BatchJob
from unroll_server.caller import Call
from unroll_server.errors import StartupError
from unroll_server.middleware.access_log import CallObserver, CallReport
from unroll_server.telemetry import tracing
from unroll_server.telemetry.metrics import Metrics
from unroll_server.telemetry.tracing import CallerTrace, Tracer

MODEL = served(random_network(), "one", 3)
PARENTS = [f"00-{digit * 32}-{digit * 16}-01" for digit in "123"]


class Context:
    """The context of a call with its metadata."""

    def __init__(self, **metadata: str) -> None:
        self._metadata = tuple(metadata.items())

    def invocation_metadata(self) -> Any:
        return self._metadata


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def tracer(exporter: InMemorySpanExporter) -> Iterator[Tracer]:
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracer = Tracer(provider, exporter)
    yield tracer
    tracer.close()


def opened(tracer: Tracer, call: Call, path: str = "/a.B/C", **metadata: str) -> CallReport:
    """Opens the report of a new call."""
    context: Any = Context(**metadata)
    return CallObserver(Metrics(), tracer=tracer).method(path).open(call, context)


def named(exporter: InMemorySpanExporter, name: str) -> list[ReadableSpan]:
    return [span for span in exporter.get_finished_spans() if span.name == name]


def trace_of(span: Any) -> str:
    return f"{span.context.trace_id:032x}"


async def test_calls_that_share_ticks_each_have_them_in_their_trace(
    exporter: InMemorySpanExporter, tracer: Tracer
) -> None:
    metrics = Metrics()
    engine = AsyncEngine([MODEL], max_lanes=8, tick_steps=4, max_queued_steps=1000, metrics=metrics)

    async def classify(parent: str) -> None:
        call = Call()
        report = opened(tracer, call, traceparent=parent)
        values = np.zeros((10, MODEL.spec.input_size), np.float32)
        await engine.run(BatchJob(MODEL, values, np.array([0, 10]), trace=call.trace))
        call.steps = 10
        report.end(0, 0.1)

    try:
        await asyncio.gather(*map(classify, PARENTS))
    finally:
        await asyncio.to_thread(engine.close)
    calls = {trace_of(span): span for span in named(exporter, "a.B/C")}
    assert set(calls) == {digit * 32 for digit in "123"}
    exemplars = [sample.exemplar for family in metrics.collect() for sample in family.samples if sample.exemplar]
    assert {each.labels["trace_id"]: each.labels["span_id"] for each in exemplars}.items() <= {
        trace: f"{span.context.span_id:016x}" for trace, span in calls.items() if span.context
    }.items()
    assert len(exemplars) >= 2
    for digit, (trace, call) in zip("123", sorted(calls.items()), strict=True):
        assert call.parent is not None
        assert f"{call.parent.span_id:016x}" == digit * 16
        assert (
            dict(call.attributes or {}).items()
            >= {
                "rpc.service": "a.B",
                "rpc.method": "C",
                "rpc.grpc.status_code": 0,
                "unroll.steps": 10,
            }.items()
        )
        (queue,) = (span for span in named(exporter, "unroll.queue") if trace_of(span) == trace)
        ticks = [span for span in named(exporter, "unroll.tick") if trace_of(span) == trace]
        assert ticks
        assert len(ticks) == dict(call.attributes or {})["unroll.ticks"]
        for span in (queue, *ticks):
            assert span.parent == call.context
            assert dict(span.attributes or {}).items() >= {"unroll.model": "one", "unroll.version": 3}.items()
            assert span.start_time is not None
            assert span.end_time is not None
            assert span.start_time <= span.end_time
    # A tick is shared: its first span links to the other calls, and theirs link to it.
    shared = [span for span in named(exporter, "unroll.tick") if len(span.links) == 2]
    assert shared
    for first in shared:
        others = [span for span in named(exporter, "unroll.tick") if first.context in [x.context for x in span.links]]
        assert {trace_of(span) for span in others} == {trace_of(link) for link in first.links}
        for span in (first, *others):
            assert dict(span.attributes or {})["unroll.lanes"] == 3
            assert (span.start_time, span.end_time) == (first.start_time, first.end_time)


def test_a_call_without_a_parent_begins_a_trace_and_one_that_is_not_sampled_costs_nothing(
    exporter: InMemorySpanExporter, tracer: Tracer
) -> None:
    opened(tracer, Call()).end(13, 0.1)
    opened(tracer, Call(), traceparent="nonsense").end(0, 0.1)
    unsampled = Call()
    opened(tracer, unsampled, traceparent=PARENTS[0][:-2] + "00").end(0, 0.1)
    assert unsampled.trace is None
    spans = exporter.get_finished_spans()
    assert [span.parent for span in spans] == [None, None]
    assert [span.status.status_code.name for span in spans] == ["ERROR", "UNSET"]


def test_a_step_of_the_wall_clock_within_a_call_leaves_its_spans_in_order(
    exporter: InMemorySpanExporter, tracer: Tracer, monkeypatch: pytest.MonkeyPatch
) -> None:
    span = tracer.call("/a.B/C", {})
    assert span is not None
    monkeypatch.setattr(time, "time_ns", lambda: 0)
    span.waited("one/3", 0.0)
    span.ticked([], "one/3", 1, 1, 1, 0.0)
    span.end(0, {})
    for ended in exporter.get_finished_spans():
        assert ended.start_time is not None
        assert ended.end_time is not None
        assert 0 <= ended.end_time - ended.start_time < 60 * 10**9


def test_a_stream_of_many_ticks_has_spans_of_the_first_ones(
    exporter: InMemorySpanExporter, tracer: Tracer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracing, "MAX_TICKS", 2)
    span = tracer.call("/a.B/C", {})
    assert span is not None
    for _ in range(5):
        span.waited("one/3", 0.001)
        span.ticked([], "one/3", 1, 1, 1, 0.001)
    span.end(0, {})
    assert len(named(exporter, "unroll.tick")) == len(named(exporter, "unroll.queue")) == 2
    (call,) = named(exporter, "a.B/C")
    assert dict(call.attributes or {})["unroll.ticks"] == 5


@pytest.mark.parametrize(
    ("traceparent", "ids"),
    [
        (PARENTS[0], "1" * 48),
        ("01" + PARENTS[1][2:] + "-more", "2" * 48),
        (PARENTS[0][:-2] + "00", None),
        ("ff" + PARENTS[0][2:], None),
        (f"00-{'0' * 32}-{'1' * 16}-01", None),
        (f"00-{'1' * 32}-{'0' * 16}-01", None),
        (PARENTS[0].replace("1", "A"), None),
        (PARENTS[0] + "0", None),
        ("", None),
    ],
)
def test_the_trace_of_a_caller_is_known_where_the_caller_records_it(traceparent: str, ids: str | None) -> None:
    trace = CallerTrace.of(traceparent)
    assert (trace and trace.ids.hex()) == ids


class Unreachable(SpanExporter):
    """An exporter that retries until it is shut down.

    Attributes:
        told_by: Threads that shut it down.
    """

    def __init__(self) -> None:
        self._over = threading.Event()
        self.told_by: list[threading.Thread] = []

    def export(self, spans: object) -> SpanExportResult:
        self._over.wait()
        return SpanExportResult.FAILURE

    def shutdown(self) -> None:
        self.told_by.append(threading.current_thread())
        self._over.set()


def test_spans_that_can_not_be_sent_hold_up_the_end_no_longer_than_that(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "FLUSH_SECONDS", 0.01)
    provider, unreachable = TracerProvider(shutdown_on_exit=False), Unreachable()
    provider.add_span_processor(BatchSpanProcessor(unreachable))
    tracer = Tracer(provider, unreachable)
    opened(tracer, Call()).end(0, 0.1)
    tracer.close()
    # While the end still waited for it; OpenTelemetry alone would wait half a minute.
    assert unreachable.told_by[0] is not threading.current_thread()


def test_probes_are_not_traced(exporter: InMemorySpanExporter, tracer: Tracer) -> None:
    opened(tracer, Call(), "/grpc.health.v1.Health/Check").end(0, 0.1)
    assert not exporter.get_finished_spans()


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": ""},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1", "OTEL_SDK_DISABLED": "TRUE"},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1", "OTEL_TRACES_EXPORTER": "none"},
    ],
)
def test_nobody_traces_where_the_environment_does_not_ask(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert Tracer.configured() is None


def test_an_endpoint_without_opentelemetry_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.grpc.trace_exporter", None)
    with pytest.raises(StartupError, match=r"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT: .*unroll-server\[otel\]"):
        Tracer.configured()


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("OTEL_EXPORTER_OTLP_TIMEOUT", "ten"),
        ("OTEL_EXPORTER_OTLP_COMPRESSION", "zip"),
        ("OTEL_BSP_MAX_QUEUE_SIZE", "1"),
    ],
)
def test_an_environment_that_opentelemetry_refuses_ends_the_start_with_the_reason(
    variable: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setenv(variable, value)
    with pytest.raises(StartupError, match=r"OTEL_.*(could not convert string to float|Invalid value|must be)"):
        Tracer.configured()
