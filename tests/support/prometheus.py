"""A real Prometheus on a free loopback port."""

import json
import shutil
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from support.daemons import Daemon, free_port

needs_prometheus = pytest.mark.skipif(
    not (shutil.which("prometheus") and shutil.which("promtool")),
    reason="there is no prometheus",
)
"""Skips a test if there is no Prometheus."""


class Prometheus(Daemon):
    """A Prometheus that reads a server's metrics once a second.

    Args:
        folder: Folder for its files.
        target: HOST:PORT of the metrics.
        labels: Labels of the target, as service discovery sets them.
    """

    def __init__(self, folder: Path, target: str, labels: dict[str, str]) -> None:
        self._address = f"127.0.0.1:{free_port()}"
        # JSON is YAML.
        jobs = [{"job_name": "unroll", "static_configs": [{"targets": [target], "labels": labels}]}]
        config = {"global": {"scrape_interval": "1s", "scrape_timeout": "1s"}, "scrape_configs": jobs}
        (folder / "prometheus.yml").write_text(json.dumps(config))
        command = ["prometheus", f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
        command += [f"--web.listen-address={self._address}", "--enable-feature=exemplar-storage"]
        super().__init__(command, folder / "prometheus.log", self._is_ready)

    def query(self, expression: str) -> list[dict[str, Any]]:
        """Returns the samples of an instant query; each has `metric` and `value`."""
        samples: list[dict[str, Any]] = self._get("query", query=expression)["result"]
        return samples

    def exemplars(self, expression: str) -> list[dict[str, Any]]:
        """Returns the exemplars, of any time, of the series in an expression; each has `labels` and `value`."""
        series: list[dict[str, Any]] = self._get("query_exemplars", query=expression, start="0", end="4e9")
        return [exemplar for each in series for exemplar in each["exemplars"]]

    def _get(self, path: str, **asked: str) -> Any:
        url = f"http://{self._address}/api/v1/{path}?{urllib.parse.urlencode(asked)}"
        with urllib.request.urlopen(url, timeout=30) as answer:
            return json.load(answer)["data"]

    def _is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://{self._address}/-/ready", timeout=1) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False
