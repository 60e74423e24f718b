"""docker-compose.yml as a separate project on a real Docker engine."""

import os
import secrets
import shutil
import socket
import subprocess
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from unroll_client import Client

REPOSITORY = Path(__file__).parents[2]
PATIENCE = 1800.0
"""Seconds for the longest step, building every image."""

Array = NDArray[np.float32]


def output_of(*command: str | Path, env: dict[str, str] | None = None) -> str:
    """Runs a command, which must succeed, and returns its standard output."""
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=PATIENCE, env=env, stdin=subprocess.DEVNULL, check=False
    )
    assert done.returncode == 0, f"{command} exited with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def compose_command() -> list[str]:
    """Returns this machine's compose command; skips without one, or without a Docker engine."""
    if shutil.which("docker") is None:
        pytest.skip("no docker command")
    engine = subprocess.run(
        ["docker", "version", "--format", "{{.Server.Version}}"], capture_output=True, text=True, check=False
    )
    if engine.returncode:
        pytest.skip(f"no Docker engine answers: {engine.stderr.strip()}")
    for command in (["docker", "compose"], ["docker-compose"]):
        if shutil.which(command[0]) and not subprocess.run([*command, "version"], capture_output=True).returncode:
            return command
    pytest.skip("neither `docker compose` nor docker-compose is here")


def inspect(container: str, what: str) -> str:
    """Inspects a container by a Go template."""
    return output_of("docker", "inspect", "--format", what, container).strip()


def received_by(container: str) -> int:
    """Returns the bytes that a container has received."""
    return int(output_of("docker", "exec", container, "cat", "/sys/class/net/eth0/statistics/rx_bytes"))


class Deployment:
    """docker-compose.yml with its own project name and ports.

    Attributes:
        address: HOST:PORT of the gateway.
        web: URL of the web service.
    """

    def __init__(self, command: list[str], data: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as probe, socket.create_server(("127.0.0.1", 0)) as other:
            port, web_port = probe.getsockname()[1], other.getsockname()[1]
        self.address = f"localhost:{port}"
        self.web = f"http://localhost:{web_port}"
        self.data = data
        name = f"unroll-test-{secrets.token_hex(4)}"
        self._command = [*command, "--project-directory", str(REPOSITORY), "--project-name", name]
        self._env = {**os.environ, "UNROLL_PORT": str(port), "UNROLL_WEB_PORT": str(web_port), "UNROLL_DATA": str(data)}

    def compose(self, *arguments: str) -> str:
        return output_of(*self._command, *arguments, env=self._env)

    def up(self, replicas: int = 1) -> None:
        """Waits until calls succeed and that many replicas are healthy."""
        try:
            self.compose("up", "--detach", "--scale", f"server={replicas}")
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.compose('logs')}") from None
        with Client(self.address) as client:
            client.models()
        deadline = time.monotonic() + PATIENCE
        while len(self.live_replicas()) < replicas:
            assert time.monotonic() < deadline, self.compose("logs")

    def live_replicas(self) -> list[str]:
        """Returns the ids of healthy server containers."""
        ids = self.compose("ps", "--quiet", "server").split()
        return [container for container in ids if inspect(container, "{{.State.Health.Status}}") == "healthy"]

    def container(self, service: str) -> str:
        """Returns the id of the only container of a service, even if it has ended."""
        (container,) = self.compose("ps", "--all", "--quiet", service).split()
        return container

    def classify_in_container(self, file: str) -> Array:
        """Classifies a file of `data` with the client's container; returns the logits [sequences, classes]."""
        self.compose("run", "--rm", "-T", "client", "classify", file, "--model", "jv", "-o", "out.parquet")
        table = pq.read_table(self.data / "out.parquet")
        return np.array(table["logits"].to_pylist(), np.float32)

    def down(self) -> None:
        self.compose("--profile", "client", "down", "--volumes", "--remove-orphans", "--rmi", "local")
