"""Cases of the proof: lengths, batches, states, cuts, saturating inputs. The same model gets the same inputs."""

import math
import zlib
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from unroll_export.graphs.tensors import state_names
from unroll_export.model import RecurrentClassifier
from unroll_export.parity.runners import Float32Array

LENGTHS = (1, 2, 3, 5, 17, 31, 101, 512)
BATCHES = (1, 2, 3, 7, 64)
MOST_STEPS = 4096
"""Most timesteps of all rows of a case: a step of wide inputs costs as much as a long run of narrow ones."""
CUT_TIME = 48
CUT_BATCHES = (1, 2, 3, 17)
MOST_LANES = 300
DRAWN = 4_194_301
"""Most normal values drawn for a case; more are repeated. A prime, so that rows do not repeat."""
SATURATED = 16.0
"""Typical activation of the first layer under inputs that saturate; tanh is 1 in float32 from about 9 on."""
MOST_GAIN = 1e4
"""Most standard deviations of an input, for features with tiny weights."""


class Values(NamedTuple):
    """Inputs and initial states before they are drawn."""

    batch: int
    time: int
    saturate: bool = False
    initial_state: bool = False


class Plan(NamedTuple):
    """One case. Consecutive cases with the same values share them and the results of one call."""

    name: str
    """Readable name, unique within a proof."""
    values: Values
    time_cuts: tuple[int, ...] = ()
    """Ends of the chunks of the second way, computed one after another with the state carried; empty for one chunk."""
    batch_cuts: tuple[int, ...] = ()
    """Ends of the row groups of the second way, computed separately; empty for one group."""

    @property
    def chunks(self) -> list[slice]:
        """Slices of time that the second way computes one after another."""
        return _pieces(self.time_cuts or (self.values.time,))

    @property
    def groups(self) -> list[slice]:
        """Slices of the batch that the second way computes separately."""
        return _pieces(self.batch_cuts or (self.values.batch,))


class Drawn(NamedTuple):
    """Values in the scale of the model's own data."""

    x: Float32Array
    """[batch, time, features], raw features."""
    initial_state: Float32Array
    """See runners: hidden states, then cells of an LSTM."""


def draw(values: Values, model: RecurrentClassifier[Any]) -> Drawn:
    """Draws values that depend on the arguments alone."""
    rng = np.random.default_rng(zlib.crc32(repr(values).encode()))
    weights = model.state_dict()
    mean, std = weights["mean"].numpy(), weights["std"].numpy()
    shape = (values.batch, values.time, mean.size)
    x = np.resize(rng.standard_normal(min(math.prod(shape), DRAWN), np.float32), shape)
    if values.saturate:
        # Only one feature of each step is large: many large terms that cancel would show the rounding of their sum,
        # which grows with their size and tells nothing about the export.
        typical = np.median(np.abs(weights["rnn.weight_ih_l0"].numpy()), axis=0)
        gains = SATURATED / np.maximum(typical, SATURATED / MOST_GAIN)
        chosen = rng.integers(mean.size, size=(*shape[:2], 1))
        driven = np.take(gains, chosen) * rng.choice([-1.0, 1.0], size=chosen.shape)
        np.put_along_axis(x, chosen, driven, axis=2)
    # States are in (-1, 1), except the cells of an LSTM and states under relu.
    limit = 0.0 if values.initial_state else 1.0
    layers = model.rnn.num_layers * len(state_names(model))
    state = rng.uniform(-limit, limit, (layers, values.batch, model.rnn.hidden_size))
    x *= std
    x += mean
    return Drawn(x, state.astype(np.float32))


def _plans() -> Iterator[Plan]:
    for time in LENGTHS:
        for batch in (batch for batch in BATCHES if batch * time <= MOST_STEPS):
            yield Plan(f"random state, length={time} batch={batch}", Values(batch, time))
            if (time, batch) == (512, 3):
                name = f"random chunks, length={time} batch={batch}"
                yield Plan(name, Values(batch, time), _random_cuts(name, time))
    for time, batch in ((1, 1), (17, 7), (5, 64)):
        yield Plan(f"zero state, length={time} batch={batch}", Values(batch, time, initial_state=True))
    for time, batch in ((1, 1), (3, 7), (17, 64)):
        yield Plan(f"saturating inputs, length={time} batch={batch}", Values(batch, time, saturate=True))
    yield from _chunked()
    yield from _grouped()


def _chunked() -> Iterator[Plan]:
    for batch in CUT_BATCHES:
        values = Values(batch, CUT_TIME)
        for size in (1, 2, 5, 16):
            yield Plan(f"chunks of {size}, length={CUT_TIME} batch={batch}", values, _every(size, CUT_TIME))
        for draw in range(2):
            name = f"random chunks {draw}, length={CUT_TIME} batch={batch}"
            yield Plan(name, values, _random_cuts(name, CUT_TIME))
    name = f"saturating inputs, random chunks, length={CUT_TIME} batch=7"
    yield Plan(name, Values(7, CUT_TIME, saturate=True), _random_cuts(name, CUT_TIME))


def _grouped() -> Iterator[Plan]:
    # Groups of 1, 2, 3, ... rows have every remainder that a kernel's blocks of rows can leave.
    lanes, values = MOST_LANES, Values(MOST_LANES, 5)
    for group in (7, 64, 257):
        yield Plan(f"groups of {group} rows, length=5 batch={lanes}", values, batch_cuts=_every(group, lanes))
    yield Plan(f"groups of 1 to 24 rows, length=5 batch={lanes}", values, batch_cuts=_growing(lanes))
    yield Plan(f"rows alone, length=3 batch={lanes}", Values(lanes, 3), batch_cuts=_every(1, lanes))
    name = f"saturating inputs, random groups of rows and random chunks, length=13 batch={lanes}"
    yield Plan(name, Values(lanes, 13, saturate=True), _random_cuts(name, 13), _random_cuts(name, lanes))


def _every(size: int, total: int) -> tuple[int, ...]:
    return (*range(size, total, size), total)


def _growing(total: int) -> tuple[int, ...]:
    ends = np.cumsum(np.arange(1, total + 1))
    return (*(int(end) for end in ends[ends < total]), total)


def _random_cuts(name: str, total: int) -> tuple[int, ...]:
    rng = np.random.default_rng(zlib.crc32(f"{name}, cuts".encode()))
    inner = rng.choice(np.arange(1, total), size=min(12, total - 1), replace=False)
    return (*(int(end) for end in np.sort(inner)), total)


def _pieces(ends: tuple[int, ...]) -> list[slice]:
    return [slice(start, end) for start, end in pairwise((0, *ends))]


PLANS = tuple(_plans())
"""All cases of a proof, in order."""
