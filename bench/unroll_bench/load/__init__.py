"""A load generator for gRPC servers: closed loops, open loops and streams, faster than the servers."""

from unroll_bench.load.loops import closed_loop, open_loop
from unroll_bench.load.pool import Peer
from unroll_bench.load.result import Call, Result, Tally
from unroll_bench.load.streams import stream_loop

__all__ = ["Call", "Peer", "Result", "Tally", "closed_loop", "open_loop", "stream_loop"]
