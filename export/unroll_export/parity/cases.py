"""What the gate tries: lengths, batches, states, cuts, inputs that saturate. The same inputs for the same model."""

import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from unroll_export.model import SimpleRNN
from unroll_export.parity.runners import Float32Array

LENGTHS = (1, 2, 3, 5, 17, 31, 101, 512)
BATCHES = (1, 2, 3, 7, 64)
MOST_STEPS = 4096
"""Timesteps of all rows of a case, at most: a step of wide inputs costs as much as a long run of narrow ones."""
CUT_TIME = 48
CUT_BATCHES = (1, 2, 3, 17)
MOST_LANES = 300
DRAWN = 4_194_301
"""Normal values that are drawn for a case, at most; more are the same again. A prime, so that rows do not repeat."""
SATURATED = 16.0
"""Typical activation of the first layer under inputs that saturate; tanh is 1 in float32 from about 9 on."""
MOST_GAIN = 1e4
"""Standard deviations that an input is driven to at most, where the weights of a feature are next to nothing."""


class Plan(NamedTuple):
    """One case before its values are drawn."""

    name: str
    """Readable, and distinct within a proof."""
    batch: int
    time: int
    time_cuts: tuple[int, ...] = ()
    """Ends of the chunks that a second way computes one after the other, the state carried; empty: one chunk."""
    batch_cuts: tuple[int, ...] = ()
    """Ends of the row groups that a second way computes apart; empty: one group."""
    saturate: bool = False
    zero_state: bool = False


@dataclass(frozen=True, slots=True)
class Case:
    """A plan with its values, drawn in the scale of the model's own data.

    Attributes:
        plan: What is tried.
        x: [batch, time, features], raw features.
        initial_state: [layers, batch, hidden].
    """

    plan: Plan
    x: Float32Array
    initial_state: Float32Array

    @property
    def chunks(self) -> list[slice]:
        """Pieces of time that the second way computes one after the other."""
        return _pieces(self.plan.time_cuts or (self.plan.time,))

    @property
    def groups(self) -> list[slice]:
        """Pieces of the batch that the second way computes apart."""
        return _pieces(self.plan.batch_cuts or (self.plan.batch,))


def draw(plan: Plan, model: SimpleRNN) -> Case:
    """Draws the values of a case; they depend on the plan's name and the model alone."""
    rng = np.random.default_rng(zlib.crc32(plan.name.encode()))
    weights = model.state_dict()
    mean, std = weights["mean"].numpy(), weights["std"].numpy()
    shape = (plan.batch, plan.time, mean.size)
    values = np.resize(rng.standard_normal(min(math.prod(shape), DRAWN), np.float32), shape)
    if plan.saturate:
        # One feature of each step does it: many large terms that cancel would show the rounding of their sum,
        # which grows with their size and says nothing of the export.
        typical = np.median(np.abs(weights["rnn.weight_ih_l0"].numpy()), axis=0)
        gains = SATURATED / np.maximum(typical, SATURATED / MOST_GAIN)
        chosen = rng.integers(mean.size, size=(plan.batch, plan.time, 1))
        driven = np.take(gains, chosen) * rng.choice([-1.0, 1.0], size=chosen.shape)
        np.put_along_axis(values, chosen, driven, axis=2)
    # States of a tanh network lie in (-1, 1).
    limit = 0.0 if plan.zero_state else 1.0
    state = rng.uniform(-limit, limit, (model.rnn.num_layers, plan.batch, model.rnn.hidden_size))
    values *= std
    values += mean
    return Case(plan, values, state.astype(np.float32))


def _plans() -> Iterator[Plan]:
    for time in LENGTHS:
        for batch in (batch for batch in BATCHES if batch * time <= MOST_STEPS):
            yield Plan(f"random state, length={time} batch={batch}", batch, time)
    for time, batch in ((1, 1), (17, 7), (5, 64)):
        yield Plan(f"zero state, length={time} batch={batch}", batch, time, zero_state=True)
    for time, batch in ((1, 1), (3, 7), (17, 64)):
        yield Plan(f"saturating inputs, length={time} batch={batch}", batch, time, saturate=True)
    yield from _chunked()
    yield from _grouped()


def _chunked() -> Iterator[Plan]:
    for batch in CUT_BATCHES:
        for size in (1, 2, 5, 16):
            name = f"chunks of {size}, length={CUT_TIME} batch={batch}"
            yield Plan(name, batch, CUT_TIME, time_cuts=_every(size, CUT_TIME))
        for draw in range(2):
            name = f"random chunks {draw}, length={CUT_TIME} batch={batch}"
            yield Plan(name, batch, CUT_TIME, time_cuts=_random_cuts(name, CUT_TIME))
    name = f"saturating inputs, random chunks, length={CUT_TIME} batch=7"
    yield Plan(name, 7, CUT_TIME, time_cuts=_random_cuts(name, CUT_TIME), saturate=True)
    name = "random chunks, length=512 batch=3"
    yield Plan(name, 3, 512, time_cuts=_random_cuts(name, 512))


def _grouped() -> Iterator[Plan]:
    # Groups of 1, 2, 3, ... rows have every remainder that a kernel's blocks of rows can leave.
    lanes, time = MOST_LANES, 5
    yield Plan(f"rows alone, length=3 batch={lanes}", lanes, 3, batch_cuts=_every(1, lanes))
    yield Plan(f"groups of 1 to 24 rows, length={time} batch={lanes}", lanes, time, batch_cuts=_growing(lanes))
    for group in (7, 64, 257):
        yield Plan(f"groups of {group} rows, length={time} batch={lanes}", lanes, time, batch_cuts=_every(group, lanes))
    name = f"saturating inputs, random groups of rows and random chunks, length=13 batch={lanes}"
    yield Plan(name, lanes, 13, _random_cuts(name, 13), _random_cuts(name, lanes), saturate=True)


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
"""Every case of a proof, in order."""
