"""The rows of the issue's table: each measures what it needs and holds it against its bars."""

from bench.rows import (
    arithmetic,
    batches,
    coalescing,
    engine,
    kernel,
    latency,
    open_loop,
    overload,
    queue,
    ragged,
    sequences,
    singles,
    states,
    streams,
)
from bench.rows.row import Row

ROWS: tuple[Row, ...] = (
    arithmetic.SCAN_ROW,
    arithmetic.PRODUCT_ROW,
    kernel.ROW,
    engine.ROW,
    batches.ROW,
    singles.ROW,
    ragged.ROW,
    latency.ROW,
    coalescing.ROW,
    streams.ROW,
    open_loop.ROW,
    overload.ROW,
    states.ROW,
    sequences.ROW,
    queue.ROW,
)
"""In the order of the issue's table."""
