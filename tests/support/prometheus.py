"""A real Prometheus on a free loopback port."""

import json
import shutil
import socket
import subprocess
import urllib.parse
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest

from support.waiting import wait_until

needs_prometheus = pytest.mark.skipif(
    not (shutil.which("prometheus") and shutil.which("promtool")),
    reason="there is no prometheus",
)
"""Skips a test if there is no Prometheus."""


class Prometheus:
    """A Prometheus that reads a server's metrics once a second.

    Args:
        folder: Folder for its files.
        target: HOST:PORT of the metrics.
        labels: Labels of the target, as service discovery sets them.
    """

    def __init__(self, folder: Path, target: str, labels: dict[str, str]) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._address = f"127.0.0.1:{probe.getsockname()[1]}"
        # JSON is YAML.
        jobs = [{"job_name": "unroll", "static_configs": [{"targets": [target], "labels": labels}]}]
        config = {"global": {"scrape_interval": "1s", "scrape_timeout": "1s"}, "scrape_configs": jobs}
        (folder / "prometheus.yml").write_text(json.dumps(config))
        self._log = folder / "prometheus.log"
        command = ["prometheus", f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [*command, f"--web.listen-address={self._address}", "--enable-feature=exemplar-storage"],
                stdout=log,
                stderr=log,
            )
        wait_until(lambda: self._is_ready() or self._process.poll() is not None, self._log.read_text)
        assert self._process.poll() is None, self._log.read_text()

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

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.terminate()
        self._process.wait()
