"""From what the user chose and what the server says of the model to a run."""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from unroll_client._types import ModelInfo
from unroll_client.cli.bench_settings import DEFAULT_IN_FLIGHT, DEFAULT_LENGTHS, Settings
from unroll_client.load.answers import StepsCheck
from unroll_client.load.lengths import parse_lengths
from unroll_client.load.loops import closed_loop, open_loop
from unroll_client.load.pool import Peer
from unroll_client.load.requests import DISTINCT, classify_calls, file_sequences, random_sequences
from unroll_client.load.result import Result, Tally
from unroll_client.load.streams import stream_loop

# Chunks after which a made-up sequence's values come again; its states go on.
_CHUNKS = 64


@dataclass(frozen=True, slots=True)
class Work:
    """A run to be made.

    Attributes:
        run: Makes it.
        of_one_call: What a call of it carries on average, by name.
    """

    run: Callable[[Peer, Tally], Awaitable[Result]]
    of_one_call: Mapping[str, float]


def prepare(settings: Settings, model: ModelInfo) -> Work:
    """Makes what is to be sent.

    Raises:
        SequenceError: the file can't be used with the model.
        ValueError: an option doesn't go with the model or the server's limits.
    """
    return _streams(settings, model) if settings.mode == "streams" else _requests(settings, model)


def _requests(settings: Settings, model: ModelInfo) -> Work:
    batch, limits = settings.batch, model.limits
    if batch > limits.max_sequences:
        raise ValueError(f"--batch: {batch} sequences, the server takes {limits.max_sequences}")
    if settings.file:
        calls, steps = classify_calls(file_sequences(settings.file, model), model, batch, None)
        if not calls:
            raise ValueError(f"{settings.file}: holds no sequences")
    else:
        lengths = parse_lengths(settings.lengths or DEFAULT_LENGTHS)
        if lengths.most is not None and lengths.most > limits.max_steps:
            raise ValueError(f"--lengths: {lengths.most} steps, the server takes {limits.max_steps}")
        generator = np.random.default_rng(settings.seed)
        sequences = random_sequences(generator, lengths, model.input_size, limits.max_steps)
        calls, steps = classify_calls(sequences, model, batch, DISTINCT)
    common: dict[str, Any] = {
        "seconds": settings.seconds,
        "warm_up": settings.warm_up,
        "connections": settings.connections,
    }

    def run(peer: Peer, tally: Tally) -> Awaitable[Result]:
        if settings.open is not None:
            return open_loop(peer, calls, rate=settings.open, seed=settings.seed, tally=tally, **common)
        return closed_loop(peer, calls, in_flight=settings.closed or DEFAULT_IN_FLIGHT, tally=tally, **common)

    return Work(run, {"sequences": batch, "steps": steps / len(calls)})


def _streams(settings: Settings, model: ModelInfo) -> Work:
    streams = settings.streams or 1
    sequences = settings.sequences or streams
    chunk, limits = settings.chunk, model.limits
    if chunk > limits.max_steps:
        raise ValueError(f"--chunk: {chunk} steps, the server takes {limits.max_steps}")
    if -(-sequences // streams) > limits.max_open_sequences:
        raise ValueError(f"--sequences: the server takes {limits.max_open_sequences} a stream; see --streams")
    if settings.file:
        # One after the other they are one long sequence, which is as good as any to feed a state with.
        arrays = list(file_sequences(settings.file, model))
        values = np.concatenate(arrays) if arrays else np.empty((0, model.input_size), np.float32)
        if len(values) < chunk:
            raise ValueError(f"{settings.file}: holds {len(values)} steps, less than a chunk")
    else:
        generator = np.random.default_rng(settings.seed)
        values = generator.standard_normal((_CHUNKS * chunk, model.input_size), dtype=np.float32)

    def run(peer: Peer, tally: Tally) -> Awaitable[Result]:
        return stream_loop(
            peer,
            sequences=sequences,
            streams=streams,
            cadence=settings.cadence,
            chunk_steps=chunk,
            seconds=settings.seconds,
            warm_up=settings.warm_up,
            model=model.name,
            version=model.version,
            values=values,
            check=StepsCheck(model.hidden_size, settings.every, model.bitwise),
            every=settings.every,
            connections=settings.connections,
            tally=tally,
        )

    return Work(run, {"steps": chunk})
