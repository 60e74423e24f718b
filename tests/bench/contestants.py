"""How each contestant's server is started."""

import sys
from collections.abc import Callable
from pathlib import Path

from bench.networks import SIZES, VERSION

GRPCIO = "Unroll, grpcio"
AFTERNOON = "afternoon server"
TORCHSCRIPT = "TorchScript by request"
EAGER = "eager PyTorch by request"
TRITON = "Triton"
ECHO = {GRPCIO: "empty echo, grpcio"}
OURS = (GRPCIO,)
"""Contestants of our own, one for each transport."""

TRITON_ENVIRONMENT = Path(".venv-triton")
"""What `make bench PEERS=triton` makes."""


def command(contestant: str, network: str, repository: Path) -> list[str | Path]:
    """The command line that serves `network` as `contestant`; it announces itself with a line "... on HOST:PORT"."""
    version = repository / network / str(VERSION)
    module = [sys.executable, "-m"]
    commands: dict[str, Callable[[], list[str | Path]]] = {
        GRPCIO: lambda: _ours(repository),
        AFTERNOON: lambda: [*module, "bench.servers.afternoon", "onnx", version / "model.onnx"],
        TORCHSCRIPT: lambda: [*module, "bench.servers.afternoon", "torchscript", version / "model.ts"],
        EAGER: lambda: [*module, "bench.servers.afternoon", "eager", network],
        TRITON: lambda: [*module, "bench.servers.triton", TRITON_ENVIRONMENT, version / "model.onnx", *_sizes(network)],
        ECHO[GRPCIO]: lambda: [*module, "bench.servers.echo"],
    }
    return commands[contestant]()


def _ours(repository: Path) -> list[str | Path]:
    serve = Path(sys.executable).with_name("unroll-serve")
    return [serve, "--models", repository, "--listen", "127.0.0.1:0", "--log-level", "warning"]


def _sizes(network: str) -> tuple[str, str]:
    features, _, classes = SIZES[network]
    return str(features), str(classes)
