"""Metrics of the server, in memory that outlives a worker, and their export to Prometheus."""

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
