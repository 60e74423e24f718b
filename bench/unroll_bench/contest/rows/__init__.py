"""Rows of the table: each measures its figures and compares them with its bars."""

from unroll_bench.contest.rows import arrivals, engine, kernel, overload, requests, sequences, states, streams
from unroll_bench.contest.rows.row import Row

ROWS: tuple[Row, ...] = (
    kernel.ROW,
    engine.ROW,
    *requests.ROWS,
    states.ROW,
    streams.ROW,
    arrivals.ROW,
    sequences.ROW,
    overload.ROW,
)
