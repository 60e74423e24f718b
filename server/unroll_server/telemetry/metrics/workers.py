"""Metrics of the processes that serve, from the operating system."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from importlib.metadata import version
from platform import python_version

from prometheus_client import ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector


class Workers(Collector):
    """CPU time, memory and open files of every process that serves or starts, and the number of restarts.

    Args:
        pids: Returns the process ids of living workers by number.
        restarts: Returns the number of restarts.
        serving: Returns the number of workers that serve, without starting ones; None if all do.
    """

    def __init__(
        self,
        pids: Callable[[], Mapping[int, int]],
        restarts: Callable[[], int] = lambda: 0,
        serving: Callable[[], int] | None = None,
    ) -> None:
        self._pids = pids
        self._restarts = restarts
        self._serving = serving

    def collect(self) -> Iterator[Metric]:
        """See prometheus_client.registry.Collector."""
        pids = self._pids()
        serving = len(pids) if self._serving is None else self._serving()
        build = {"version": version("unroll-server"), "python": python_version()}
        yield InfoMetricFamily("unroll_build", "Versions of the server and of Python.", build)
        yield GaugeMetricFamily("unroll_workers", "Processes that serve.", value=serving)
        yield CounterMetricFamily("unroll_worker_restarts", "Restarts of workers.", value=self._restarts())
        families: dict[str, Metric] = {}
        for worker, pid in pids.items():
            for metric in ProcessCollector(pid=partial(int, pid), registry=None).collect():
                family = families.setdefault(metric.name, Metric(metric.name, metric.documentation, metric.type))
                for sample in metric.samples:
                    family.add_sample(sample.name, {"worker": str(worker)}, sample.value)
        yield from families.values()
