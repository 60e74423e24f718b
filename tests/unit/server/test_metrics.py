"""Metrics: counts are exported and summed over workers, dead ones included."""

import importlib.metadata
import os
import platform
import re
import socket
import subprocess
import sys
import urllib.request
from bisect import bisect_left
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector
from prometheus_client.samples import Exemplar

from unroll_server.addresses import Address
from unroll_server.errors import StartupError
from unroll_server.telemetry.metrics import LANES, QUEUE_SECONDS, TICK_SECONDS, Metrics, Workers, served, shared
from unroll_server.telemetry.metrics.figures import DROPPED, MODEL_SIZE
from unroll_server.telemetry.tracing import CallerTrace

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def parsed(text: str) -> Samples:
    """The samples of an exposition, by name and labels."""
    families = text_string_to_metric_families(text)
    return {(s.name, frozenset(s.labels.items())): s.value for family in families for s in family.samples}


def samples_of(*collectors: Collector) -> Samples:
    registry = CollectorRegistry()
    for collector in collectors:
        registry.register(collector)
    return parsed(generate_latest(registry).decode())


def key(name: str, **labels: str) -> tuple[str, frozenset[tuple[str, str]]]:
    return name, frozenset(labels.items())


def test_a_tick_is_counted_in_every_figure() -> None:
    metrics = Metrics()
    jv = metrics.of("jv/1")
    jv.serves(1)
    jv.tick(lanes=3, steps=16, real_steps=40, seconds=0.0004)
    jv.tick(lanes=64, steps=16, real_steps=1024, seconds=2.0)
    jv.dropped("expired", 2)
    jv.dropped("cancelled", 5)
    jv.waited(0.0)
    samples = samples_of(metrics)
    assert samples[key("unroll_ticks_total", model="jv", version="1")] == 2
    assert samples[key("unroll_steps_total", model="jv", version="1", kind="real")] == 1064
    assert samples[key("unroll_steps_total", model="jv", version="1", kind="computed")] == 67 * 16
    assert samples[key("unroll_dropped_sequences_total", model="jv", version="1", cause="expired")] == 2
    assert samples[key("unroll_dropped_sequences_total", model="jv", version="1", cause="cancelled")] == 5
    assert samples[key("unroll_tick_seconds_sum", model="jv", version="1")] == pytest.approx(2.0004)
    assert samples[key("unroll_tick_seconds_count", model="jv", version="1")] == 2
    assert samples[key("unroll_tick_seconds_bucket", model="jv", version="1", le="0.00025")] == 0
    assert samples[key("unroll_tick_seconds_bucket", model="jv", version="1", le="0.0005")] == 1
    assert samples[key("unroll_tick_seconds_bucket", model="jv", version="1", le="1.0")] == 1
    assert samples[key("unroll_tick_seconds_bucket", model="jv", version="1", le="+Inf")] == 2
    assert samples[key("unroll_tick_lanes_sum", model="jv", version="1")] == 67
    assert samples[key("unroll_tick_lanes_bucket", model="jv", version="1", le="64.0")] == 2
    assert samples[key("unroll_queue_seconds_bucket", model="jv", version="1", le="0.0001")] == 1


def test_a_model_has_one_set_of_figures() -> None:
    metrics = Metrics()
    assert metrics.of("a") is metrics.of("a")
    assert metrics.of("a") is not metrics.of("b")


def test_a_call_is_counted_in_every_figure() -> None:
    metrics = Metrics()
    unary = metrics.method("/a.B/C", "unary")
    labels = {"grpc_type": "unary", "grpc_service": "a.B", "grpc_method": "C"}
    for code, took in ((0, 0.0004), (0, 0.3), (3, 0.001)):
        unary.started()
        unary.received()
        unary.handled(code, took)
    unary.started()
    unary.sent()
    samples = samples_of(metrics)
    assert samples[key("grpc_server_started_total", **labels)] == 4
    assert samples[key("grpc_server_msg_received_total", **labels)] == 3
    assert samples[key("grpc_server_msg_sent_total", **labels)] == 1
    assert samples[key("grpc_server_handled_total", **labels, grpc_code="OK")] == 2
    assert samples[key("grpc_server_handled_total", **labels, grpc_code="InvalidArgument")] == 1
    assert sum(name == "grpc_server_handled_total" for name, _ in samples) == 2
    assert samples[key("grpc_server_handling_seconds_count", **labels)] == 3
    assert samples[key("grpc_server_handling_seconds_sum", **labels)] == pytest.approx(0.3014)
    assert samples[key("grpc_server_handling_seconds_bucket", **labels, le="0.001")] == 2


def test_every_status_code_has_its_name() -> None:
    metrics = Metrics()
    unary = metrics.method("/a.B/C", "unary")
    for code in grpc.StatusCode:
        unary.handled(code.value[0], 0.0)
    found = {dict(labels)["grpc_code"] for name, labels in samples_of(metrics) if name == "grpc_server_handled_total"}
    # Go's spelling: CANCELLED alone differs in more than case and underscores.
    assert {name.upper() for name in found} == {
        code.name.replace("_", "").replace("CANCELLED", "CANCELED") for code in grpc.StatusCode
    }


def test_the_server_s_own_figures() -> None:
    metrics = Metrics()
    metrics.server.session("started")
    metrics.server.session("a new one")
    metrics.server.refused("steps")
    metrics.server.queued[0], metrics.server.queued[1] = 7, 99
    metrics.server.tasks(5)
    samples = samples_of(metrics)
    assert samples[key("unroll_sessions_total", outcome="started")] == 1
    assert samples[key("unroll_sessions_total", outcome="a new one")] == 1
    assert samples[key("unroll_sessions_total", outcome="taken")] == 0
    assert samples[key("unroll_refused_total", cause="steps")] == 1
    assert samples[key("unroll_queued_steps")] == 7
    assert samples[key("unroll_queued_bytes")] == 99
    assert samples[key("unroll_event_loop_tasks")] == 5


def test_the_runtime_of_a_model_is_told_with_its_instruction_set_or_the_reason() -> None:
    metrics = Metrics()
    metrics.model_runs(1, "jv/1", "kernel", "x86-64-v4", "")
    metrics.model_runs(1, "jv/2", "onnx", "", "no compiler")
    samples = samples_of(metrics)
    kernel = key("unroll_model_runtime", model="jv", version="1", runtime="kernel", variant="x86-64-v4", reason="")
    onnx = key("unroll_model_runtime", model="jv", version="2", runtime="onnx", variant="", reason="no compiler")
    assert (samples[kernel], samples[onnx]) == (1, 1)
    metrics.model_runs(-1, "jv/1", "kernel", "x86-64-v4", "")
    assert kernel not in samples_of(metrics)


def test_the_series_of_a_version_leave_with_it_and_come_back_with_their_counts() -> None:
    metrics = Metrics()
    jv = metrics.of("jv/1")
    jv.found(1)
    jv.loaded()
    jv.serves(1)
    jv.opened()
    jv.tick(1, 1, 1, 0.001)
    broken = metrics.of("jv/2")
    broken.found(1)
    broken.refused()
    samples = samples_of(metrics)
    loads = {name: value for name, value in samples.items() if name[0] == "unroll_model_loads_total" and value}
    assert loads == {
        key("unroll_model_loads_total", model="jv", version="1", outcome="loaded"): 1,
        key("unroll_model_loads_total", model="jv", version="2", outcome="refused"): 1,
    }
    assert samples[key("unroll_open_sequences", model="jv", version="1")] == 1
    assert samples[key("unroll_model_served", model="jv", version="1")] == 1
    # A version that drains is no longer in the repository.
    jv.found(-1)
    assert loads.items() <= samples_of(metrics).items()
    jv.closed()
    jv.serves(-1)
    broken.found(-1)
    assert not [name for name, labels in samples_of(metrics) if ("model", "jv") in labels]
    jv.serves(1)
    assert samples_of(metrics)[key("unroll_ticks_total", model="jv", version="1")] == 1


def test_gauges_are_those_of_the_workers_that_live(tmp_path: Path) -> None:
    living = [0, 1]
    for worker in living:
        metrics = Metrics(tmp_path, worker)
        metrics.server.queued[0], metrics.server.queued[1] = 10, 100
        metrics.of("jv/1").serves(1)
        metrics.of("jv/1").opened()
        metrics.of("jv/1").waited(0.1)
    parent = Metrics(tmp_path, living=lambda: living)
    assert samples_of(parent)[key("unroll_queued_steps")] == 20
    assert samples_of(parent)[key("unroll_open_sequences", model="jv", version="1")] == 2
    living.remove(1)
    samples = samples_of(parent)
    assert samples[key("unroll_queued_steps")] == 10
    assert samples[key("unroll_open_sequences", model="jv", version="1")] == 1
    assert samples[key("unroll_queue_seconds_count", model="jv", version="1")] == 2
    # Its replacement has nothing open, and continues the counts.
    living.append(1)
    Metrics(tmp_path, 1).of("jv/1").waited(0.1)
    samples = samples_of(parent)
    assert samples[key("unroll_open_sequences", model="jv", version="1")] == 1
    assert samples[key("unroll_queue_seconds_count", model="jv", version="1")] == 3


def test_an_unknown_cause_is_refused() -> None:
    with pytest.raises(KeyError):
        Metrics().of("a").dropped("bored", 1)


seconds = st.one_of(st.floats(0, 20), st.sampled_from(TICK_SECONDS + QUEUE_SECONDS))
ticks = st.tuples(st.integers(1, 2000), st.integers(1, 64), seconds)
models = st.sampled_from(["jv/1", "jv/2", "a b/7", "ü/%2F"])


def labels_of(model: str) -> dict[str, str]:
    return dict(zip(("model", "version"), model.split("/"), strict=True))


@given(
    lives=st.lists(st.tuples(st.integers(0, 3), st.lists(st.tuples(models, ticks, seconds), max_size=8)), max_size=8)
)
def test_the_sum_over_workers_and_their_lives(
    lives: list[tuple[int, list[tuple[str, tuple[int, int, float], float]]]],
) -> None:
    expected: Counter[tuple[str, frozenset[tuple[str, str]]]] = Counter()
    with TemporaryDirectory() as folder:
        for worker, events in lives:
            # The replacement of a dead worker continues in the same files.
            metrics = Metrics(Path(folder), worker)
            for model, (lanes, steps, took), waited in events:
                metrics.of(model).tick(lanes, steps, lanes * steps // 2, took)
                metrics.of(model).waited(waited)
                labels = labels_of(model)
                expected[key("unroll_ticks_total", **labels)] += 1
                expected[key("unroll_steps_total", **labels, kind="computed")] += lanes * steps
                expected[key("unroll_steps_total", **labels, kind="real")] += lanes * steps // 2
                for name, bounds, value in (
                    ("unroll_tick_seconds", TICK_SECONDS, took),
                    ("unroll_tick_lanes", LANES, lanes),
                    ("unroll_queue_seconds", QUEUE_SECONDS, waited),
                ):
                    expected[key(f"{name}_count", **labels)] += 1
                    for bound in bounds[bisect_left(bounds, value) :]:
                        expected[key(f"{name}_bucket", **labels, le=str(bound))] += 1
        serving = Metrics(Path(folder), 4)
        for model in {model for _, events in lives for model, *_ in events}:
            serving.of(model).serves(1)
        samples = samples_of(Metrics(Path(folder)))
    assert {name: samples[name] for name in expected} == expected
    assert {labels for _, labels in samples if dict(labels).keys() == {"model", "version"}} == {
        frozenset(labels_of(model).items()) for _, events in lives for model, *_ in events
    }


def test_what_a_killed_worker_counted_stays(tmp_path: Path) -> None:
    program = (
        "import os, sys; from pathlib import Path; from unroll_server.telemetry.metrics import Metrics;"
        "Metrics(Path(sys.argv[1]), 1).of('jv/1').tick(2, 8, 9, 0.001); os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", program, tmp_path], check=False).returncode == -9
    Metrics(tmp_path, 1).of("jv/1").tick(2, 8, 10, 0.001)
    Metrics(tmp_path, 1).of("jv/1").serves(1)
    samples = samples_of(Metrics(tmp_path))
    assert samples[key("unroll_steps_total", model="jv", version="1", kind="real")] == 19


def descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def test_models_that_come_and_go_take_no_descriptors(tmp_path: Path) -> None:
    before = descriptors()
    metrics = Metrics(tmp_path)
    for version in range(1500):
        metrics.of(f"m/{version}").dropped("expired", version)
    assert descriptors() == before + 1
    found = Metrics(tmp_path).memory.sums("model", MODEL_SIZE)
    assert {name: figures[DROPPED] for name, figures in found.items()} == {f"m/{v}": v for v in range(1500)}


def test_figures_that_outgrow_a_file_go_on_in_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared, "FILE_BYTES", 4096)
    for life in (1, 2):
        metrics = Metrics(tmp_path)
        for version in range(40):
            metrics.of(f"m/{version}").serves(1)
            metrics.of(f"m/{version}").waited(1.0)
        samples = samples_of(Metrics(tmp_path))
        for version in range(40):
            assert samples[key("unroll_queue_seconds_count", model="m", version=str(version))] == life
            assert samples[key("unroll_model_served", model="m", version=str(version))] == 1
    assert len(list(tmp_path.iterdir())) > 2
    # A model that the replacement does not serve is no longer served there.
    Metrics(tmp_path).of("m/0").serves(1)
    served_now = [labels for name, labels in samples_of(Metrics(tmp_path)) if name == "unroll_model_served"]
    assert served_now == [frozenset({("model", "m"), ("version", "0")})]


def test_processes_have_figures_while_they_live() -> None:
    program = "print('here', flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        workers = Workers(lambda: {0: os.getpid(), 1: process.pid}, lambda: 3)
        samples = samples_of(workers)
        for worker in ("0", "1"):
            assert samples[key("process_resident_memory_bytes", worker=worker)] > 1e6
            assert key("process_cpu_seconds_total", worker=worker) in samples
        process.communicate(b"\n")
    samples = samples_of(workers)
    assert key("process_resident_memory_bytes", worker="0") in samples
    assert key("process_resident_memory_bytes", worker="1") not in samples
    assert samples[key("unroll_worker_restarts_total")] == 3
    build = {"version": importlib.metadata.version("unroll-server"), "python": platform.python_version()}
    assert samples[key("unroll_build_info", **build)] == 1


class Traced(CallerTrace):
    """The trace with a number."""

    def __init__(self, number: int) -> None:
        super().__init__(number.to_bytes(16) + (~number % 2**64).to_bytes(8))

    @property
    def labels(self) -> dict[str, str]:
        return {"trace_id": self.ids[:16].hex(), "span_id": self.ids[16:].hex()}


def exemplars_of(text: str) -> dict[tuple[str, str], Exemplar]:
    """The exemplars of an OpenMetrics exposition, by the metric's name and the bound of the bucket."""
    samples = [sample for family in openmetrics(text) for sample in family.samples]  # type: ignore[no-untyped-call]
    return {(each.name, each.labels["le"]): each.exemplar for each in samples if each.exemplar}


def test_the_last_traced_value_of_a_bucket_over_all_workers_is_its_exemplar(tmp_path: Path) -> None:
    for worker in (1, 0):
        metrics = Metrics(tmp_path, worker)
        jv = metrics.of("jv/1")
        jv.serves(1)
        jv.waited(0.3, Traced(worker))
        jv.waited(0.4)
        jv.tick(1, 1, 1, 5.0, Traced(10 + worker))
        metrics.method("/a.B/C", "unary").handled(0, 0.002 + worker, trace=Traced(20 + worker))
    registry = CollectorRegistry()
    registry.register(Metrics(tmp_path))
    exemplars = exemplars_of(generate_openmetrics(registry).decode())  # type: ignore[no-untyped-call]
    assert {name: (each.value, each.labels) for name, each in exemplars.items()} == {
        ("unroll_queue_seconds_bucket", "0.5"): (0.3, Traced(0).labels),
        ("unroll_tick_seconds_bucket", "+Inf"): (5.0, Traced(10).labels),
        ("grpc_server_handling_seconds_bucket", "0.0025"): (0.002, Traced(20).labels),
        ("grpc_server_handling_seconds_bucket", "2.5"): (1.002, Traced(21).labels),
    }
    assert "#" not in re.sub("(?m)^# (HELP|TYPE) ", "", generate_latest(registry).decode())


def test_prometheus_gets_them_over_http_in_the_format_that_it_asks_for(caplog: pytest.LogCaptureFixture) -> None:
    metrics = Metrics()
    metrics.of("jv/1").serves(1)
    metrics.of("jv/1").tick(1, 1, 1, 0.1, Traced(7))
    workers = Workers(lambda: {0: os.getpid()})
    with caplog.at_level("INFO"), served(Address.of("--metrics", "127.0.0.1:0"), metrics, workers):
        url = caplog.messages[-1].removeprefix("metrics on ")
        with urllib.request.urlopen(url, timeout=30) as answer:  # noqa: S310
            assert answer.headers["Content-Type"].startswith("text/plain")
            assert parsed(answer.read().decode())[key("unroll_ticks_total", model="jv", version="1")] == 1
        request = urllib.request.Request(url, headers={"Accept": "application/openmetrics-text; version=1.0.0"})  # noqa: S310
        with urllib.request.urlopen(request, timeout=30) as answer:  # noqa: S310
            assert answer.headers["Content-Type"].startswith("application/openmetrics-text")
            assert exemplars_of(answer.read().decode()).keys() == {("unroll_tick_seconds_bucket", "0.1")}


def test_an_address_in_use_is_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        refused = pytest.raises(StartupError, match=f"--metrics: can't listen on 127.0.0.1:{port}")
        with refused, served(Address.of("--metrics", f"127.0.0.1:{port}"), Metrics()):
            raise AssertionError


def test_nothing_is_served_where_nobody_asks() -> None:
    with served(None, Metrics()):
        pass
