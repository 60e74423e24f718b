"""Metrics of a server as Prometheus collects them; docs/operations.md explains each."""

from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Exemplar
from prometheus_client.utils import floatToGoString

from unroll_server.telemetry.metrics import figures as place
from unroll_server.telemetry.metrics.exemplars import latest
from unroll_server.telemetry.metrics.figures import CallMetrics, ModelMetrics, ServerMetrics
from unroll_server.telemetry.metrics.memory import Figures, Memory

UNKNOWN = "unknown"
"""Type, service and method for calls of unknown methods."""


class Metrics(Collector):
    """Metrics of a serving process, or of all workers that share a folder.

    Args:
        folder: Folder that workers share, see Memory; None for this process's memory.
        worker: Number of the worker; a replacement continues the counts of the dead worker.
        living: Returns the numbers of the living workers, whose gauges are summed; None for all.

    Attributes:
        server: Metrics that belong to no model.
    """

    def __init__(
        self, folder: Path | None = None, worker: int = 0, living: Callable[[], Collection[int]] | None = None
    ) -> None:
        self._memory = Memory(folder, worker, place.GAUGES, living)
        self._models: dict[str, ModelMetrics] = {}
        self._methods: dict[tuple[str, str], CallMetrics] = {}
        self._runtimes: dict[str, memoryview[float]] = {}
        self._server: ServerMetrics | None = None

    @property
    def server(self) -> ServerMetrics:
        """Metrics that belong to no model."""
        # Created at the first count: a process that only sums needs no file.
        if self._server is None:
            self._server = ServerMetrics(self._memory)
        return self._server

    @property
    def queue(self) -> ServerMetrics:
        """See unroll_engine.observer.Metrics."""
        return self.server

    @property
    def memory(self) -> Memory:
        """The numbers behind the metrics, and others that are not exported to Prometheus."""
        return self._memory

    def of(self, model: str) -> ModelMetrics:
        """Returns the metrics of a model version, the same object for the same name.

        Args:
            model: NAME/VERSION.
        """
        if model not in self._models:
            self._models[model] = ModelMetrics(self._memory, model)
        return self._models[model]

    def method(self, path: str, kind: str) -> CallMetrics:
        """Returns the metrics of a method, the same object for the same arguments.

        Args:
            path: `/package.Service/Method`.
            kind: "unary", "client_stream", "server_stream" or "bidi_stream".
        """
        if (path, kind) not in self._methods:
            self._methods[path, kind] = CallMetrics(self._memory, f"{kind}{path}")
        return self._methods[path, kind]

    def no_method(self) -> CallMetrics:
        """Returns the metrics of calls of unknown methods."""
        return self.method(f"/{UNKNOWN}/{UNKNOWN}", UNKNOWN)

    def model_runs(self, more: int, model: str, runtime: str, variant: str, reason: str) -> None:
        """Records that a model version is loaded (1) or unloaded (-1).

        Args:
            more: The change.
            model: NAME/VERSION.
            runtime: "kernel", "onnx" or "torchscript".
            variant: Instruction set that the kernel uses.
            reason: Reason why it is not the kernel; empty if it is.
        """
        name = "\x1f".join((model, runtime, variant, reason))
        if name not in self._runtimes:
            self._runtimes[name] = self._memory.of("runtime", name, 1)
        self._runtimes[name][0] += more

    def collect(self) -> Iterator[Metric]:
        """See prometheus_client.registry.Collector."""
        yield from _models(self._memory)
        yield from _calls(self._memory)
        yield from self._server_figures()
        runtimes = GaugeMetricFamily(
            "unroll_model_runtime",
            "Processes in which the runtime has the model version.",
            labels=["model", "version", "runtime", "variant", "reason"],
        )
        for name, figures in self._memory.sums("runtime", 1).items():
            if figures[0]:
                key, *runtime = name.split("\x1f")
                runtimes.add_metric([*_version(key), *runtime], figures[0])
        yield runtimes

    def _server_figures(self) -> Iterator[Metric]:
        sessions = CounterMetricFamily(
            "unroll_sessions", "Outcomes of sessions, and of requests for them.", labels=["outcome"]
        )
        refused = CounterMetricFamily("unroll_refused", "Work refused because a limit was reached.", labels=["cause"])
        for family, kind in ((sessions, "session"), (refused, "refused")):
            for name, figures in self._memory.sums(kind, 1).items():
                family.add_metric([name], figures[0])
            yield family
        now = self._memory.sums("server", place.SERVER_SIZE).get("", np.zeros(place.SERVER_SIZE)).tolist()
        for name, help_text, value in (
            ("queued_steps", "Timesteps admitted and not yet answered.", now[place.QUEUED_STEPS]),
            ("queued_bytes", "Bytes of values admitted and not yet answered.", now[place.QUEUED_BYTES]),
            ("event_loop_tasks", "Tasks of the event loops, counted every few seconds.", now[place.TASKS]),
        ):
            yield GaugeMetricFamily(f"unroll_{name}", help_text, value=value)


def _version(key: str) -> list[str]:
    """Returns the labels of a model version, NAME/VERSION."""
    name, _, version = key.rpartition("/")
    return [name, version]


def _models(memory: Memory) -> Iterator[Metric]:
    exemplars = latest(memory, "model", place.MODEL_SIZE)
    labels = ["model", "version"]
    ticks = CounterMetricFamily("unroll_ticks", "Ticks of the engine.", labels=labels)
    steps = CounterMetricFamily(
        "unroll_steps",
        "Timesteps: real ones belong to sequences, computed ones are those and the padding within ticks.",
        labels=[*labels, "kind"],
    )
    dropped = CounterMetricFamily(
        "unroll_dropped_sequences",
        "Sequences dropped before they were computed: the deadline passed, or the caller left.",
        labels=[*labels, "cause"],
    )
    seconds = HistogramMetricFamily("unroll_tick_seconds", "Duration of a tick.", labels=labels)
    lanes = HistogramMetricFamily("unroll_tick_lanes", "Sequences in a tick.", labels=labels)
    queue = HistogramMetricFamily("unroll_queue_seconds", "Time that work waited in the queue.", labels=labels)
    served = GaugeMetricFamily("unroll_model_served", "Processes that serve the model version.", labels=labels)
    opened = GaugeMetricFamily("unroll_open_sequences", "Sequences open on streams.", labels=labels)
    loads = CounterMetricFamily("unroll_model_loads", "Model versions loaded and refused.", labels=[*labels, "outcome"])
    # The series of a version leave with it: a server that gets a version a day would else keep all of them.
    for key, figures in memory.sums("model", place.MODEL_SIZE).items():
        version, traced = _version(key), exemplars.get(key, {})
        if figures[place.FOUND] or figures[place.SERVED]:
            _add_each(loads, version, place.LOADS, figures[place.LOADED :])
        if not figures[place.SERVED]:
            continue
        steps.add_metric([*version, "real"], figures[place.REAL])
        steps.add_metric([*version, "computed"], figures[place.COMPUTED])
        _add_each(dropped, version, place.CAUSES, figures[place.DROPPED :])
        ticks.add_metric(version, _add_histogram(seconds, version, figures, place.TICK, place.TICK_SECONDS, traced))
        _add_histogram(lanes, version, figures, place.WIDTH, place.LANES, traced)
        _add_histogram(queue, version, figures, place.QUEUE, place.QUEUE_SECONDS, traced)
        served.add_metric(version, figures[place.SERVED])
        opened.add_metric(version, figures[place.OPEN])
    yield from (ticks, steps, dropped, seconds, lanes, queue, served, opened, loads)


def _calls(memory: Memory) -> Iterator[Metric]:
    exemplars = latest(memory, "call", place.CALL_SIZE)
    labels = ["grpc_type", "grpc_service", "grpc_method"]
    started = CounterMetricFamily("grpc_server_started", "Calls that have arrived.", labels=labels)
    handled = CounterMetricFamily("grpc_server_handled", "Calls that have ended.", labels=[*labels, "grpc_code"])
    received = CounterMetricFamily("grpc_server_msg_received", "Messages received.", labels=labels)
    sent = CounterMetricFamily("grpc_server_msg_sent", "Messages sent.", labels=labels)
    seconds = HistogramMetricFamily("grpc_server_handling_seconds", "Duration of calls.", labels=labels)
    for name, figures in memory.sums("call", place.CALL_SIZE).items():
        method = name.split("/")
        started.add_metric(method, figures[place.STARTED])
        received.add_metric(method, figures[place.RECEIVED])
        sent.add_metric(method, figures[place.SENT])
        _add_each(handled, method, place.CODES, figures[place.HANDLED :], unless_zero=True)
        _add_histogram(seconds, method, figures, place.HANDLING, place.CALL_SECONDS, exemplars.get(name, {}))
    yield from (started, handled, received, sent, seconds)


def _add_each(
    family: CounterMetricFamily, labels: list[str], names: tuple[str, ...], figures: Figures, unless_zero: bool = False
) -> None:
    """Adds a counter for each name."""
    for name, value in zip(names, figures.tolist(), strict=False):
        if value or not unless_zero:
            family.add_metric([*labels, name], value)


def _add_histogram(
    family: HistogramMetricFamily,
    labels: list[str],
    figures: Figures,
    begin: int,
    bounds: tuple[float, ...],
    exemplars: Mapping[int, Exemplar],
) -> float:
    """Adds a histogram, whose sum and counts are at `begin` in `figures`; returns how many values it counted."""
    places = range(begin + 1, begin + len(bounds) + 2)
    cumulated = np.cumsum(figures[places]).tolist()
    names = [*map(floatToGoString, bounds), "+Inf"]
    # None is taken, too.
    traced: list[Any] = [exemplars.get(place) for place in places]
    family.add_metric(labels, list(zip(names, cumulated, traced, strict=True)), float(figures[begin]))
    return float(cumulated[-1])
