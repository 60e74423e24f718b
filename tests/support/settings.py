"""Settings of a server for tests."""

from pathlib import Path

from unroll_server.config import Settings

SETTINGS = Settings(models=Path("/models"), runtime="onnx")
