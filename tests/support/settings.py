"""Settings of a server that tests change to their needs."""

from pathlib import Path

from unroll_server.config import Settings

SETTINGS = Settings(
    models=Path("/models"),
    listen="127.0.0.1:50051",
    runtime="onnx",
    device="cpu",
    max_lanes=64,
    tick_steps=32,
    max_sequences=4096,
    max_steps=65536,
    max_open_sequences=10000,
    max_message_bytes=2**24,
    max_queued_steps=4_000_000,
    drain_timeout=30.0,
    log_level="info",
)
