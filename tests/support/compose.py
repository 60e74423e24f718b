"""docker-compose.yml under a project of its own, on a real engine."""

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
"""Seconds for the longest step, building every image; what takes longer is stuck."""

Array = NDArray[np.float32]


def output_of(*command: str | Path, env: dict[str, str] | None = None) -> str:
    """Runs a command to its end, which must be a good one, and returns what it printed on standard output."""
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=PATIENCE, env=env, stdin=subprocess.DEVNULL, check=False
    )
    assert done.returncode == 0, f"{command} exited with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def compose_command() -> list[str]:
    """The compose that this machine has; skips where there is none, or no engine to run it on."""
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
    """What the engine knows of a container, by a Go template."""
    return output_of("docker", "inspect", "--format", what, container).strip()


def received_by(container: str) -> int:
    """Bytes that have come to a container over the network."""
    return int(output_of("docker", "exec", container, "cat", "/sys/class/net/eth0/statistics/rx_bytes"))


class Deployment:
    """docker-compose.yml under a project name, and on a port, of its own."""

    def __init__(self, command: list[str], data: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        self.address = f"localhost:{port}"
        self.data = data
        name = f"unroll-test-{secrets.token_hex(4)}"
        self._command = [*command, "--project-directory", str(REPOSITORY), "--project-name", name]
        self._env = {**os.environ, "UNROLL_PORT": str(port), "UNROLL_DATA": str(data)}

    def compose(self, *arguments: str) -> str:
        return output_of(*self._command, *arguments, env=self._env)

    def up(self, replicas: int = 1) -> None:
        """Returns once calls get through and that many replicas are healthy."""
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
        """Container ids of the servers that run and are healthy."""
        ids = self.compose("ps", "--quiet", "server").split()
        return [container for container in ids if inspect(container, "{{.State.Health.Status}}") == "healthy"]

    def container(self, service: str) -> str:
        """Id of the only container of a service, ended or not."""
        (container,) = self.compose("ps", "--all", "--quiet", service).split()
        return container

    def classify_in_container(self, file: str) -> Array:
        """Classifies a file of `data` with the client's container; returns the logits [sequences, classes]."""
        self.compose("run", "--rm", "-T", "client", "classify", file, "--model", "jv", "-o", "out.parquet")
        table = pq.read_table(self.data / "out.parquet")
        return np.array(table["logits"].to_pylist(), np.float32)

    def down(self) -> None:
        self.compose("--profile", "client", "down", "--volumes", "--remove-orphans", "--rmi", "local")
