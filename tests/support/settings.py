"""Settings of a server that tests change to their needs."""

from pathlib import Path

from unroll_server.config import Settings

SETTINGS = Settings(models=Path("/models"), runtime="onnx")
