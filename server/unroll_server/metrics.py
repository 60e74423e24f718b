"""What is counted while serving, in memory that outlives a worker, and how Prometheus gets it."""

import logging
import mmap
import os
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from urllib.parse import quote, unquote

import numpy as np
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry, ProcessCollector, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from unroll_server.errors import StartupError

_log = logging.getLogger(__name__)

TICK_SECONDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0)
QUEUE_SECONDS = (0.0001, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)
LANES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0)

# Where a model's figures stand among its float64 numbers. A histogram is its sum, then one count a bucket and one for
# what is above them all. Plain numbers in shared memory, because a tick through prometheus_client's own counters took
# 10 microseconds, 17 in its multiprocess mode, against one here.
_REAL, _COMPUTED, _EXPIRED, _CANCELLED, _TICK = range(5)
_WIDTH = _TICK + len(TICK_SECONDS) + 2
_QUEUE = _WIDTH + len(LANES) + 2
_SIZE = _QUEUE + len(QUEUE_SECONDS) + 2
_CAUSES = {"expired": _EXPIRED, "cancelled": _CANCELLED}


class ModelMetrics:
    """The figures of one model, told by the engine. Made by `Metrics.of`; each call takes about a microsecond."""

    def __init__(self, memory: "mmap.mmap | bytearray") -> None:
        self._figures = memoryview(memory).cast("d")

    def tick(self, lanes: int, steps: int, real_steps: int, seconds: float) -> None:
        """Counts a tick.

        Args:
            lanes: Sequences in it.
            steps: Timesteps of each that were computed.
            real_steps: Timesteps, over all lanes, that belonged to sequences; the others were padding.
            seconds: How long it took.
        """
        figures = self._figures
        figures[_REAL] += real_steps
        figures[_COMPUTED] += lanes * steps
        figures[_TICK] += seconds
        figures[_TICK + 1 + bisect_left(TICK_SECONDS, seconds)] += 1
        figures[_WIDTH] += lanes
        figures[_WIDTH + 1 + bisect_left(LANES, lanes)] += 1

    def dropped(self, cause: str, sequences: int) -> None:
        """Counts sequences that were dropped before they were computed.

        Args:
            cause: "expired" (the deadline passed) or "cancelled" (the caller left).
            sequences: How many.
        """
        self._figures[_CAUSES[cause]] += sequences

    def waited(self, seconds: float) -> None:
        """Counts the time that work waited in the queue."""
        self._figures[_QUEUE] += seconds
        self._figures[_QUEUE + 1 + bisect_left(QUEUE_SECONDS, seconds)] += 1


class Metrics(Collector):
    """The figures of a serving process, or of all workers that share a folder.

    Args:
        folder: Where workers share their figures, in a file for each worker and model, so that what a worker counted
            outlives it. None: in this process's memory alone.
        worker: The worker's number; one that takes a dead one's place counts on in its files.
    """

    def __init__(self, folder: Path | None = None, worker: int = 0) -> None:
        self._folder = folder
        self._worker = worker
        self._memories: dict[str, mmap.mmap | bytearray] = {}
        self._models: dict[str, ModelMetrics] = {}

    def of(self, model: str) -> ModelMetrics:
        """The figures of one model; the same object for the same name."""
        if model not in self._models:
            self._memories[model] = self._memory(model)
            self._models[model] = ModelMetrics(self._memories[model])
        return self._models[model]

    def _memory(self, model: str) -> mmap.mmap | bytearray:
        if self._folder is None:
            return bytearray(8 * _SIZE)
        with (self._folder / f"{self._worker}.{quote(model, safe='')}").open("a+b") as file:
            os.ftruncate(file.fileno(), 8 * _SIZE)
            return mmap.mmap(file.fileno(), 8 * _SIZE)

    def _sums(self) -> dict[str, NDArray[np.float64]]:
        """The figures [_SIZE] by model, over all workers."""
        if self._folder is None:
            return {model: np.frombuffer(bytes(memory)) for model, memory in self._memories.items()}
        sums: dict[str, NDArray[np.float64]] = {}
        for file in sorted(self._folder.iterdir()):
            _, _, quoted = file.name.partition(".")
            content = file.read_bytes()
            # A worker that starts has made its file, but not yet given it its size.
            if len(content) == 8 * _SIZE:
                model = unquote(quoted)
                sums[model] = sums.get(model, np.zeros(_SIZE)) + np.frombuffer(content)
        return sums

    def collect(self) -> Iterator[Metric]:
        """See prometheus_client.registry.Collector."""
        ticks = CounterMetricFamily("unroll_ticks", "Ticks of the engine.", labels=["model"])
        steps = CounterMetricFamily(
            "unroll_steps",
            "Timesteps: real ones belong to sequences, computed ones are those and the padding within ticks.",
            labels=["model", "kind"],
        )
        dropped = CounterMetricFamily(
            "unroll_dropped_sequences",
            "Sequences dropped before they were computed: the deadline passed, or the caller left.",
            labels=["model", "cause"],
        )
        seconds = HistogramMetricFamily("unroll_tick_seconds", "Time that a tick took.", labels=["model"])
        lanes = HistogramMetricFamily("unroll_tick_lanes", "Sequences in a tick.", labels=["model"])
        queue = HistogramMetricFamily("unroll_queue_seconds", "Time that work waited to be run.", labels=["model"])
        for model, figures in self._sums().items():
            steps.add_metric([model, "real"], figures[_REAL])
            steps.add_metric([model, "computed"], figures[_COMPUTED])
            for cause, place in _CAUSES.items():
                dropped.add_metric([model, cause], figures[place])
            ticks.add_metric([model], _add_histogram(seconds, model, figures[_TICK:_WIDTH], TICK_SECONDS))
            _add_histogram(lanes, model, figures[_WIDTH:_QUEUE], LANES)
            _add_histogram(queue, model, figures[_QUEUE:], QUEUE_SECONDS)
        yield from (ticks, steps, dropped, seconds, lanes, queue)


def _add_histogram(
    family: HistogramMetricFamily, model: str, figures: NDArray[np.float64], bounds: tuple[float, ...]
) -> float:
    """Adds a model's histogram, given as its sum and its counts; returns how many values it counted."""
    cumulated = np.cumsum(figures[1:]).tolist()
    names = [*map(floatToGoString, bounds), "+Inf"]
    family.add_metric([model], list(zip(names, cumulated, strict=True)), float(figures[0]))
    return float(cumulated[-1])


class Workers(Collector):
    """CPU time, memory and open files of every process that serves, and how often one had to be started again.

    Args:
        pids: Tells the process ids of those that live, by the worker's number.
        restarts: Tells how often a worker was started again.
    """

    def __init__(self, pids: Callable[[], Mapping[int, int]], restarts: Callable[[], int] = lambda: 0) -> None:
        self._pids = pids
        self._restarts = restarts

    def collect(self) -> Iterator[Metric]:
        """See prometheus_client.registry.Collector."""
        pids = self._pids()
        yield GaugeMetricFamily("unroll_workers", "Processes that serve.", value=len(pids))
        yield CounterMetricFamily(
            "unroll_worker_restarts", "Workers started again after their end.", value=self._restarts()
        )
        families: dict[str, Metric] = {}
        for worker, pid in pids.items():
            for metric in ProcessCollector(pid=partial(int, pid), registry=None).collect():
                family = families.setdefault(metric.name, Metric(metric.name, metric.documentation, metric.type))
                for sample in metric.samples:
                    family.add_sample(sample.name, {"worker": str(worker)}, sample.value)
        yield from families.values()


@contextmanager
def served(address: tuple[str, int] | None, *collectors: Collector) -> Iterator[None]:
    """Serves metrics over HTTP, on a thread of its own, for as long as the context is open.

    Args:
        address: Host and port to listen on; port 0 picks a free one; None serves nothing.
        collectors: What is served.

    Raises:
        StartupError: the address can't be listened on.
    """
    if address is None:
        yield
        return
    registry = CollectorRegistry()
    for collector in collectors:
        registry.register(collector)
    host, port = address
    try:
        server, thread = start_http_server(port, host, registry)
    except OSError as error:
        raise StartupError(f"--metrics: can't listen on {host}:{port}: {error.strerror}") from None
    try:
        _log.info("metrics on http://%s:%d/metrics", f"[{host}]" if ":" in host else host, server.server_port)
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
