"""The Helm chart by Helm's own engine, the dashboard by Grafana's own types, and Envoy in front of two replicas."""

import asyncio
import json
import re
import socket
import subprocess
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from support.processes import PATIENCE, ServerProcess, made_by_make
from support.waiting import until

from unroll_client import AsyncClient, Unavailable
from unroll_proto.sequences import Sequence
from unroll_server.sources import Sources

ROOT = Path(__file__).parents[2]
CHART = ROOT / "deploy" / "helm" / "unroll"
DASHBOARD = ROOT / "deploy" / "grafana" / "unroll.json"
ENVOY = ROOT / "deploy" / "envoy" / "envoy.yaml"
EVERYTHING = {
    "models": {"image": "registry/models:7"},
    "settings": {"workers": 2, "session_ttl": 60, "drain_timeout": 42.5, "tuning": {"max_lanes": 32}},
    "autoscaling": {"enabled": True},
    "serviceMonitor": {"enabled": True},
    "prometheusRule": {"enabled": True},
    "dashboard": {"enabled": True},
    "tls": {"cert": "CERT", "key": "KEY", "ca": "CA", "verifyClients": True},
    "tokens": {"content": "TOKENS"},
    "sessions": {"existingSecret": "redis"},
    "probes": {"model": "jv"},
    "networkPolicy": {"egress": [{"to": [{"podSelector": {}}]}]},
}
PLAIN = {"models": {"claim": "models"}}
WRONG = {
    "exactly one of models.claim, models.url and models.image": {},
    "replica": {**PLAIN, "replica": 2},
    "listen": {**PLAIN, "settings": {"listen": "0.0.0.0:1"}},
    "/tls/key": {**PLAIN, "tls": {"cert": "CERT"}},
    "autoscaling.cpu": {**PLAIN, "autoscaling": {"enabled": True, "cpu": 0, "queueSeconds": ""}},
}


@pytest.fixture(scope="session")
def tools() -> Path:
    """Folder of the tools that check deploy/."""
    return made_by_make(".venv-deploy") / "bin"


def by_kind(documents: list[dict[str, Any]]) -> dict[str, Any]:
    return {document["kind"]: document for document in documents}


def test_the_chart_renders_what_kubernetes_and_the_server_accept(tools: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [tools / "python", ROOT / "tests" / "support" / "chart.py", CHART],
        input=json.dumps([PLAIN, EVERYTHING, *WRONG.values()]),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    plain, everything, *wrong = found["cases"]
    assert found["lint"]["errors"] == []
    assert [problem in case.get("error", "") for problem, case in zip(WRONG, wrong, strict=True)] == [True] * len(WRONG)
    assert by_kind(plain["documents"]).keys() == {
        *("ConfigMap", "ServiceAccount", "Deployment", "Service", "NetworkPolicy", "PodDisruptionBudget"),
    }
    kinds = by_kind(everything["documents"])
    assert kinds.keys() == by_kind(plain["documents"]).keys() | {
        *("Secret", "HorizontalPodAutoscaler", "ServiceMonitor", "PrometheusRule"),
    }
    pod = kinds["Deployment"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert pod["terminationGracePeriodSeconds"] > 42.5 + container["lifecycle"]["preStop"]["sleep"]["seconds"]
    # The kubelet can't speak TLS.
    assert container["readinessProbe"]["exec"]["command"][-1] == "jv"
    mounted = {mount["mountPath"] for mount in container["volumeMounts"]}
    (text,) = (document["data"]["unroll.toml"] for document in everything["documents"] if _has_settings(document))
    file = tmp_path / "unroll.toml"
    file.write_text(text)
    settings = Sources.read({"config": file}).settings()
    for path in (Path(settings.models), settings.tls_cert, settings.tls_client_ca, settings.tokens):
        assert {str(path), str(path and path.parent)} & mounted
    assert (settings.workers, settings.tuning.max_lanes, settings.drain_timeout) == (2, 32, 42.5)


READ_AND_WRITE = """
import json, sys
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard
register_default_plugins()
print(JSONEncoder().encode(Dashboard.from_json(json.load(sys.stdin))))
"""


def lost(given: Any, kept: Any, path: str = "") -> Iterator[str]:
    """Yields the paths of the fields that are missing or different in `kept`."""
    if isinstance(given, dict) and isinstance(kept, dict):
        for name, value in given.items():
            yield from lost(value, kept.get(name), f"{path}/{name}")
    elif isinstance(given, list) and isinstance(kept, list) and len(given) == len(kept):
        for index, values in enumerate(zip(given, kept, strict=True)):
            yield from lost(*values, f"{path}/{index}")
    elif given != kept:
        yield path


def test_the_dashboard_has_no_field_that_grafana_does_not_know(tools: Path) -> None:
    text = DASHBOARD.read_text()
    command: list[str | Path] = [tools / "python", "-c", READ_AND_WRITE]
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert list(lost(json.loads(text), json.loads(done.stdout))) == []


def _has_settings(document: dict[str, Any]) -> bool:
    return document["kind"] == "ConfigMap" and "unroll.toml" in document["data"]


def handled(server: ServerProcess, method: str) -> int:
    """Returns the number of calls of a method that ended well."""
    (url,) = re.findall(r"metrics on (http\S+)", server.log)
    with urllib.request.urlopen(url, timeout=PATIENCE) as answer:  # noqa: S310
        counted = re.findall(rf'handled_total\{{grpc_code="OK",grpc_method="{method}".* (\S+)', answer.read().decode())
    return int(float(counted[0])) if counted else 0


@pytest.fixture
def replicas(bundle_root: Path, tmp_path: Path) -> Iterator[list[ServerProcess]]:
    options = ("--metrics", "127.0.0.1:0")
    with (
        ServerProcess(bundle_root, tmp_path / "one", *options) as one,
        ServerProcess(bundle_root, tmp_path / "two", *options) as two,
    ):
        yield [one, two]


@pytest.fixture
def envoy(tools: Path, replicas: list[ServerProcess], tmp_path: Path) -> Iterator[str]:
    """Address of an Envoy with the configuration of deploy/, in front of the replicas."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = ENVOY.read_text()
    config = re.sub(r"(?m)^admin:\n.*\n", "", config).replace(
        "0.0.0.0, port_value: 50051", f"127.0.0.1, port_value: {port}"
    )
    (endpoint,) = re.findall(r"(?m)^ +- endpoint: .*\n", config)
    addresses = [server.address.split(":") for server in replicas]
    each = (endpoint.replace("unroll-headless", host).replace("50051", number) for host, number in addresses)
    (tmp_path / "envoy.yaml").write_text(config.replace(endpoint, "".join(each)))
    command: list[str | Path] = [
        tools / "envoy",
        "-c",
        tmp_path / "envoy.yaml",
        "--concurrency",
        "1",
        "--use-dynamic-base-id",
    ]
    with (tmp_path / "envoy.log").open("wb") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        yield f"127.0.0.1:{port}"
        process.terminate()


async def test_envoy_spreads_calls_keeps_sessions_on_their_replica_and_survives_a_drain(
    envoy: str, replicas: list[ServerProcess], tmp_path: Path, vowels: list[Sequence]
) -> None:
    values = vowels[0].values
    async with AsyncClient(envoy, wait_for_ready=True) as client:

        async def reached() -> bool:
            with suppress(Unavailable):
                await asyncio.gather(*(client.classify([values], model="jv") for _ in range(8)))
            return all(handled(replica, "Classify") for replica in replicas)

        await until(reached, (tmp_path / "envoy.log").read_text)
        expected = await client.advance("alone", values, model="jv", start=True)
        # In a replica's own memory: on the other one the session would be unknown.
        for number in range(16):
            session = f"session {number} ü"
            await client.advance(session, values[:3], model="jv", start=True)
            answer = await client.advance(session, values[3:], first_step=3)
            assert answer.states is not None
            assert expected.states is not None
            assert answer.states.tobytes() == expected.states[3:].tobytes()
        assert all(handled(replica, "Advance") for replica in replicas)
        assert replicas[0].stop() == 0
        for _ in range(8):
            assert len(await client.classify([values], model="jv")) == 1
