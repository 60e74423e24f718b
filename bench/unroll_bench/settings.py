"""Options of a load, and the run that they define."""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import numpy as np

from unroll_bench.load import Peer, Result, closed_loop, open_loop, stream_loop
from unroll_bench.load.answers import StepsCheck
from unroll_bench.load.lengths import Lengths
from unroll_bench.load.requests import random_calls
from unroll_client import ModelInfo

DEFAULT_IN_FLIGHT: Final = 64
DEFAULT_LENGTHS: Final = "5..120"
# Chunks after which the values of a stream repeat; its states do not.
_CHUNKS: Final = 64


@dataclass(frozen=True, slots=True)
class Load:
    """A load on one model.

    Attributes:
        run: Drives a server and returns the result.
        of_one_call: Average content of a call, by name.
    """

    run: Callable[[Peer], Awaitable[Result]]
    of_one_call: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Settings:
    """Options of `unroll-bench` about the load; None if not given.

    Attributes:
        closed: Requests to keep in flight.
        open: Requests per second.
        sequences: Sequences to keep open on streams.
        streams: Calls that carry them.
        cadence: Seconds between the chunks of a sequence.
        chunk: Timesteps of a chunk.
        lengths: Lengths of random sequences, as in `Lengths.parse`.
        batch: Sequences of a request.
        connections: TCP connections.
        seconds: Seconds to measure.
        warm_up: Seconds before the measurement.

    Raises:
        ValueError: options exclude each other.
    """

    closed: int | None
    open: float | None
    sequences: int | None
    streams: int | None
    cadence: float | None
    chunk: int
    lengths: str | None
    batch: int
    connections: int
    seconds: float
    warm_up: float

    def __post_init__(self) -> None:
        kinds = {
            "--closed": self.closed,
            "--open": self.open,
            "--sequences, --streams or --cadence": self.sequences or self.streams or self.cadence,
        }
        if len(given := [name for name, value in kinds.items() if value]) > 1:
            raise ValueError(f"{' and '.join(given)}: one kind of load at a time")
        if self.mode == "streams" and self.lengths:
            raise ValueError("--lengths: for requests only; streams have --chunk")
        if self.mode != "streams" and self.chunk > 1:
            raise ValueError("--chunk: for streams only; requests have --lengths")
        if self.sequences and self.streams and self.sequences < self.streams:
            raise ValueError(f"--sequences: {self.sequences}, for {self.streams} streams as many or more expected")

    @property
    def mode(self) -> str:
        """Kind of load: "closed", "open" or "streams"."""
        if self.sequences or self.streams or self.cadence:
            return "streams"
        return "open" if self.open else "closed"

    def load(self, model: ModelInfo) -> Load:
        """Makes the load for a model.

        Raises:
            ValueError: an option does not fit the model or the server's limits.
        """
        timing: dict[str, Any] = {
            "seconds": self.seconds,
            "warm_up": self.warm_up,
            "connections": self.connections,
        }
        return self._streams(model, timing) if self.mode == "streams" else self._requests(model, timing)

    def _requests(self, model: ModelInfo, timing: dict[str, Any]) -> Load:
        lengths, limits = Lengths.parse(self.lengths or DEFAULT_LENGTHS), model.limits
        if self.batch > limits.max_sequences:
            raise ValueError(f"--batch: {self.batch} sequences, the server takes {limits.max_sequences}")
        if lengths.most > limits.max_steps:
            raise ValueError(f"--lengths: {lengths.most} steps, the server takes {limits.max_steps}")
        if model.form and not model.class_labels:
            raise ValueError(f"--model: {model.name} has no classes to ask for; --streams measures it")
        calls, steps = random_calls(lengths, model, self.batch)
        if self.open is None:
            run = partial(closed_loop, calls=calls, in_flight=self.closed or DEFAULT_IN_FLIGHT, **timing)
        else:
            run = partial(open_loop, calls=calls, rate=self.open, **timing)
        return Load(run, {"sequences": self.batch, "steps": steps})

    def _streams(self, model: ModelInfo, timing: dict[str, Any]) -> Load:
        streams, limits = self.streams or 1, model.limits
        sequences = self.sequences or streams
        if self.chunk > limits.max_steps:
            raise ValueError(f"--chunk: {self.chunk} steps, the server takes {limits.max_steps}")
        if -(-sequences // streams) > limits.max_open_sequences:
            raise ValueError(f"--sequences: the server takes {limits.max_open_sequences} a stream; see --streams")
        values = np.random.default_rng(0).standard_normal((_CHUNKS * self.chunk, model.input_size), dtype=np.float32)
        run = partial(
            stream_loop,
            sequences=sequences,
            streams=streams,
            cadence=self.cadence,
            chunk_steps=self.chunk,
            batch=self.batch,
            model=model.name,
            version=model.version,
            values=values,
            check=StepsCheck(model.hidden_size or model.output_size, model.bitwise),
            **timing,
        )
        return Load(run, {"steps": self.chunk})
