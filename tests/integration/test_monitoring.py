"""The alerts, the dashboard and the metric for scaling of deploy/, on a real Prometheus that reads a loaded server."""

import asyncio
import json
import math
import re
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from support.processes import ServerProcess
from support.prometheus import Prometheus, needs_prometheus
from support.waiting import until

from unroll_client import AsyncClient, NotFound
from unroll_proto.sequences import Sequence

DEPLOY = Path(__file__).parents[2] / "deploy"
ALERTS = DEPLOY / "prometheus" / "alerts.yml"
POD = {"namespace": "models", "pod": "unroll-0"}
OPTIONS = ("--metrics", "127.0.0.1:0", "--workers", "2")
TRACE = "00-" + "7" * 32 + "-" + "8" * 16 + "-01"


class Target(NamedTuple):
    """A query of a panel.

    Attributes:
        title: The panel's title.
        query: The query, with the variables as Grafana sets them for All.
        exemplars: True if the panel shows exemplars.
    """

    title: str
    query: str
    exemplars: bool = False


def targets() -> Iterator[Target]:
    """Yields every query of the dashboard, and that of the scaling."""
    for panel in json.loads((DEPLOY / "grafana" / "unroll.json").read_text())["panels"]:
        for target in panel.get("targets", ()):
            query = re.sub(r"\$(job|instance|model)\b", ".*", target["expr"]).replace("$__rate_interval", "5s")
            yield Target(panel["title"], query, target.get("exemplar", False))
    # What prometheus-adapter asks for when Kubernetes scales.
    text = (DEPLOY / "prometheus" / "adapter.yml").read_text()
    query = text.partition("metricsQuery: >-")[2].replace("<<.GroupBy>>", "pod").replace("[1m]", "[5s]")
    matchers = ",".join(f'{name}="{value}"' for name, value in POD.items())
    yield Target("scaling", query.replace("<<.LabelMatchers>>", matchers))


def has_data(prometheus: Prometheus, target: Target) -> bool:
    if target.exemplars:
        ids = {"trace_id": "7" * 32, "span_id": "8" * 16}
        if ids not in [exemplar["labels"] for exemplar in prometheus.exemplars(target.query)]:
            return False
    return any(math.isfinite(float(sample["value"][1])) for sample in prometheus.query(target.query))


async def load(address: str, vowels: list[Sequence]) -> None:
    """Calls every method that a panel shows, until it is cancelled."""
    async with AsyncClient(address) as client:
        traced = client.with_metadata([("traceparent", TRACE)])
        streamed = client.unroll("jv")
        for turn in range(10**6):
            values = vowels[turn % len(vowels)].values
            await traced.classify([values], model="jv")
            await streamed.send(values)
            await client.advance("s", values, model="jv", start=turn == 0)
            with suppress(NotFound):
                await client.classify([values], model="absent")


@needs_prometheus
def test_each_alert_fires_on_its_symptom_and_none_on_a_healthy_server() -> None:
    done = subprocess.run(
        ["promtool", "test", "rules", ALERTS.with_suffix(".test.yml")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    tested = re.findall(r'alertname(?:: |=")(\w+)', ALERTS.with_suffix(".test.yml").read_text())
    assert set(tested) == set(re.findall(r"alert: (\w+)", ALERTS.read_text()))


@needs_prometheus
async def test_every_panel_has_data_and_no_alert_names_an_unknown_metric(
    bundle_root: Path, tmp_path: Path, vowels: list[Sequence]
) -> None:
    with ServerProcess(bundle_root, tmp_path / "log", *OPTIONS) as server:
        (metrics,) = re.findall(r"metrics on http://([^/\s]+)", server.log)
        calling = asyncio.create_task(load(server.address, vowels))
        with Prometheus(tmp_path, metrics, POD) as prometheus:
            empty = dict.fromkeys(targets())
            assert sum(target.exemplars for target in empty) == 3

            async def all_have_data() -> bool:
                if calling.done():
                    calling.result()
                for target in list(empty):
                    if await asyncio.to_thread(has_data, prometheus, target):
                        del empty[target]
                return not empty

            await until(all_have_data, lambda: empty)
            named = set(re.findall(r"\b(?:unroll|grpc|process)_[a-z_]+\b(?!\{?=)", ALERTS.read_text()))
            known = {sample["metric"]["__name__"] for sample in prometheus.query('{__name__!=""}')}
            assert named - {"grpc_code", "grpc_method"} <= known
        calling.cancel()
        await asyncio.gather(calling, return_exceptions=True)
        assert server.stop() == 0, server.log
