"""Settings of a server for tests."""

from unroll_server.config import Settings

SETTINGS = Settings(models="/models", runtime="onnx")
