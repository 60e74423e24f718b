"""docs/operations.md has a row for every metric that is exported, and none for another."""

import os
import re
from pathlib import Path

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from unroll_server.telemetry.metrics import Metrics, Workers

OPERATIONS = Path(__file__).parents[3] / "docs" / "operations.md"


def exported() -> dict[str, tuple[str, set[str]]]:
    """Type and labels by name, of all metrics once everything has happened."""
    metrics = Metrics()
    metrics.server.session("started")
    metrics.of("jv/1").serves(1)
    metrics.model_loaded("jv/1")
    metrics.model_runs(1, "jv/1", "kernel", "avx2", "")
    metrics.method("/a.B/C", "unary").handled(0, 0.0)
    registry = CollectorRegistry()
    registry.register(metrics)
    registry.register(Workers(lambda: {0: os.getpid()}))
    found = {}
    for family in text_string_to_metric_families(generate_latest(registry).decode()):
        name = family.name + ("_total" if family.type == "counter" else "")
        labels = {label for sample in family.samples for label in sample.labels}
        found[name] = (family.type, labels - {"le", "grpc_type", "grpc_service", "grpc_method"})
    return found


def documented() -> dict[str, tuple[bool, set[str]]]:
    """Whether it is a gauge, and labels by name."""
    rows = re.findall(
        r"^\| `((?:unroll|grpc|process)_\w+)`( \(g\))? \| ([\w, ]*)\|", OPERATIONS.read_text(), re.MULTILINE
    )
    assert len({name for name, _, _ in rows}) == len(rows)
    return {name: (bool(gauge), {label.strip() for label in labels.split(",")} - {""}) for name, gauge, labels in rows}


def test_every_metric_has_its_row_with_its_labels() -> None:
    said = {name: (kind == "gauge", labels) for name, (kind, labels) in exported().items()}
    assert documented() == said


def test_alerts_ask_for_metrics_and_labels_that_there_are() -> None:
    (alerts,) = re.findall(r"^```yaml\n(.*?)^```", OPERATIONS.read_text(), re.MULTILINE | re.DOTALL)
    known = exported()
    asked = re.findall(r"\b((?:unroll|grpc|process)_\w+?)(?:_bucket)?(?:\{(\w+)[=!~]+\"[^\"]*\"\})?\[", alerts)
    assert len(asked) == alerts.count("[")
    for name, label in asked:
        assert name in known
        assert not label or label in known[name][1]
