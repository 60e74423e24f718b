"""What is counted while serving, in memory that outlives a worker, and how Prometheus gets it."""

from unroll_server.telemetry.metrics.collector import Metrics
from unroll_server.telemetry.metrics.figures import (
    CALL_SECONDS,
    LANES,
    QUEUE_SECONDS,
    TICK_SECONDS,
    CallMetrics,
    ModelMetrics,
    ServerMetrics,
)
from unroll_server.telemetry.metrics.http import served
from unroll_server.telemetry.metrics.workers import Workers

__all__ = [
    "CALL_SECONDS",
    "LANES",
    "QUEUE_SECONDS",
    "TICK_SECONDS",
    "CallMetrics",
    "Metrics",
    "ModelMetrics",
    "ServerMetrics",
    "Workers",
    "served",
]
