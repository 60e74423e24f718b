"""The model that all contestants serve, and the commands that start their servers."""

import sys
from pathlib import Path

MODEL = "rnn"
"""Name of the model in every server."""
FEATURES, HIDDEN, CLASSES = 12, 128, 9

NATIVE, GRPCIO = "Unroll, native", "Unroll, grpcio"
OURS = {NATIVE: "native", GRPCIO: "grpcio"}
"""Contestants of our own, with the transport of each."""
AFTERNOON = "afternoon server"
TORCHSCRIPT = "TorchScript by request"
TRITON = "Triton"

TRITON_ENVIRONMENT = Path(".venv-triton")
"""Made by `make bench PEERS=triton`."""


def command(contestant: str, repository: Path) -> list[str | Path]:
    """Returns the command that serves the repository's model; it prints a line with "on HOST:PORT" once it serves."""
    version = repository / MODEL / "1"
    server = [sys.executable, "-m", f"{__package__}.servers.{'triton' if contestant == TRITON else 'afternoon'}"]
    if contestant == AFTERNOON:
        return [*server, "onnx", version / "model.onnx"]
    if contestant == TORCHSCRIPT:
        return [*server, "torchscript", version / "model.ts"]
    if contestant == TRITON:
        return [*server, TRITON_ENVIRONMENT, version / "model.onnx"]
    serve = Path(sys.executable).with_name("unroll-serve")
    options = ["--listen", "127.0.0.1:0", "--transport", OURS[contestant], "--log-level", "warning"]
    return [serve, "--models", repository, *options]
