"""Classification: splits a call into RPCs within the server's limits, and joins their answers."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable
from collections.abc import Sequence as Listing
from dataclasses import dataclass, replace
from itertools import count

import numpy as np
from numpy.typing import ArrayLike, NDArray

from unroll_client._arrays import FLOAT32, Ragged, invalid, join, pack, unpack
from unroll_client._errors import FailedPrecondition, Internal, NotFound, UnrollError, renumbered
from unroll_client._types import Classification, Limits, ModelInfo
from unroll_proto.snapshot import Snapshot
from unroll_proto.v1 import unroll_pb2 as pb

# RPCs of one call in flight: enough to keep a server busy while answers travel.
IN_FLIGHT = 4
# Bytes of a message besides values, lengths and states: names and framing of fields.
ENVELOPE_BYTES = 512
_OVERFLOW = re.compile(r"values of sequence (\d+) (.+)")
# Attempts of a call with sequences over the limits, whose version may be unloaded in between.
_BEGINNINGS = 3
# A length as a varint, and the framing of an initial state.
_SEQUENCE_BYTES = 16

Call = Callable[[pb.ClassifyRequest], Awaitable[pb.ClassifyResponse]]


@dataclass(slots=True)  # frozen would double the cost of making one
class Batch:
    """Checked arguments of one `classify` call.

    Attributes:
        ragged: The sequences.
        states: Initial state of each sequence; empty if all begin at the zero state.
        return_final_states: True to return the final states.
        size: Largest size of the batch in a message, in bytes, besides ENVELOPE_BYTES.
    """

    ragged: Ragged
    states: tuple[pb.Snapshot, ...]
    return_final_states: bool
    size: int

    @classmethod
    def make(
        cls,
        sequences: Listing[ArrayLike],
        initial_states: Listing[Snapshot | None] | None,
        return_final_states: bool,
    ) -> Batch:
        """Checks and packs the arguments of a call.

        Raises:
            InvalidArgument: a sequence can't be used, or the number of initial states is another.
        """
        ragged = pack(sequences)
        if initial_states is None:
            return cls.of(ragged, (), return_final_states)
        if len(initial_states) != len(ragged.lengths):
            what = f"{len(initial_states)} states for {len(ragged.lengths)} sequences"
            raise invalid("initial_states", what)
        for index, state in enumerate(initial_states):
            if not isinstance(state, Snapshot | None):
                raise invalid(f"initial_states[{index}]", f"a Snapshot or None expected, got {type(state).__name__}")
        states = tuple(pb.Snapshot() if state is None else state.to_proto() for state in initial_states)
        return cls.of(ragged, states, return_final_states)

    @classmethod
    def of(cls, ragged: Ragged, states: tuple[pb.Snapshot, ...], return_final_states: bool) -> Batch:
        """Makes a batch of packed arguments."""
        size = len(ragged.values) + _SEQUENCE_BYTES * len(ragged.lengths) + sum(state.ByteSize() for state in states)
        return cls(ragged, states, return_final_states, size)

    def __len__(self) -> int:
        return len(self.ragged.lengths)

    def request(self, model: str, version: int, start: int, end: int, first_value: int) -> pb.ClassifyRequest:
        """Makes the request for the sequences `start` to `end - 1`, whose values begin at row `first_value`."""
        lengths, row = self.ragged.lengths[start:end], self.ragged.features * FLOAT32.itemsize
        return pb.ClassifyRequest(
            model=model,
            version=version,
            lengths=lengths,
            values=self.ragged.values[first_value * row : (first_value + sum(lengths)) * row],
            initial_states=self.states[start:end],
            return_final_states=self.return_final_states,
        )

    def explain(self, error: UnrollError, info: ModelInfo) -> None:
        """Raises a server's error about the concatenated values in terms of the caller's sequences.

        Raises:
            InvalidArgument: the sequences have another number of features than the model, or the arithmetic of one
                overflows.
        """
        for each in error.fields:
            if each.field != "values":
                continue
            if self.ragged.features != info.input_size:
                what = f"{self.ragged.features} features, model {info.name} has {info.input_size}"
                raise invalid("sequences[0]", what) from error
            if place := _OVERFLOW.match(each.description):
                raise invalid(f"sequences[{place[1]}]", f"values {place[2]}") from error

    def parts(self, limits: Limits) -> list[tuple[int, int]]:
        """Splits the batch into ranges of sequences that fit one message each; every single sequence must fit."""
        sizes = np.array(self.ragged.lengths, np.int64) * self._row + self._overheads()
        room = message_room(limits)
        ends = np.cumsum(sizes)
        most = limits.max_sequences or len(sizes)
        parts, start, sent = [], 0, 0
        while start < len(sizes):
            end = min(int(np.searchsorted(ends, sent + room, side="right")), start + most)
            parts.append((start, end))
            start, sent = end, int(ends[end - 1])
        return parts

    def most_steps(self, limits: Limits) -> NDArray[np.int64]:
        """Returns the largest number of steps of each sequence that fits a message, int64 [sequences].

        Raises:
            InvalidArgument: not even one step fits.
        """
        overheads = self._overheads()
        most = (message_room(limits) - overheads) // max(self._row, 1)
        large = np.flatnonzero(most < 1)
        if len(large):
            size = self._row + int(overheads[large[0]])
            what = f"a step and the state take {size} bytes, the server takes messages of {limits.max_message_bytes}"
            raise invalid(f"sequences[{large[0]}]", what)
        return np.minimum(most, limits.max_steps) if limits.max_steps else most

    def pieces(self, numbers: NDArray[np.int64], begins: NDArray[np.int64], ends: NDArray[np.int64]) -> Ragged:
        """Cuts pieces out of some sequences.

        Args:
            numbers: int64 [pieces], the sequences to cut.
            begins: int64 [sequences], first step of the piece of each sequence.
            ends: int64 [sequences], step after the last one of the piece.
        """
        lengths = np.array(self.ragged.lengths, np.int64)
        starts, row = np.cumsum(lengths) - lengths, self._row
        rows = zip((starts + begins)[numbers].tolist(), (starts + ends)[numbers].tolist(), strict=True)
        values = memoryview(self.ragged.values)
        joined = b"".join([values[begin * row : end * row] for begin, end in rows])
        return Ragged(joined, (ends - begins)[numbers].tolist(), self.ragged.features)

    @property
    def _row(self) -> int:
        return self.ragged.features * FLOAT32.itemsize

    def _overheads(self) -> NDArray[np.int64]:
        """Returns the bytes of each sequence besides its values, int64 [sequences]."""
        sizes = [state.ByteSize() for state in self.states] or [0] * len(self)
        return np.array(sizes, np.int64) + _SEQUENCE_BYTES


def message_room(limits: Limits) -> int:
    """Returns the bytes of one message that are left for its sequences."""
    return (limits.max_message_bytes or 1 << 62) - ENVELOPE_BYTES


async def classify(batch: Batch, model: str, version: int, info: ModelInfo, call: Call) -> Classification:
    """Classifies a batch by one RPC or several.

    A sequence over the server's limits is computed in pieces, each from the state after the previous one. The last
    pieces go together with the other sequences. One version answers all pieces: if it is unloaded in between, and the
    caller did not ask for it, all begin again.
    """
    for tries in count(1):
        rest, of_version = batch, version
        everything = np.arange(len(batch))
        lengths = np.array(batch.ragged.lengths, np.int64)
        begins = np.zeros_like(lengths)
        try:
            while len(long := np.flatnonzero(lengths - begins > (most := rest.most_steps(info.limits)))):
                states = list(rest.states) or [pb.Snapshot() for _ in everything]
                ends = np.minimum(begins + most, lengths)
                piece = Batch.of(batch.pieces(long, begins, ends), tuple(states[i] for i in long.tolist()), True)
                result = await _classify(piece, long.tolist(), model, of_version, info, call)
                for index, state in zip(long.tolist(), result.final_states or (), strict=True):
                    states[index] = state.to_proto()
                begins[long], of_version = ends[long], result.version
                rest = replace(rest, states=tuple(states))
            if begins.any():
                rest = Batch.of(batch.pieces(everything, begins, lengths), rest.states, batch.return_final_states)
            return await _classify(rest, everything.tolist(), model, of_version, info, call)
        except (NotFound, FailedPrecondition):
            # The refusal can be about one of the caller's states.
            if of_version == version or batch.states or tries == _BEGINNINGS:
                raise
    raise AssertionError


async def _classify(
    batch: Batch, numbers: Listing[int], model: str, version: int, info: ModelInfo, call: Call
) -> Classification:
    """Classifies sequences that fit a message each.

    If a new version is loaded in between, the parts that an older one answered are requested again, so that one
    version answers all.

    Args:
        batch: The sequences.
        numbers: Their numbers in the caller's batch, for errors.
        model: Name of the model.
        version: Version of the model; 0 for the newest.
        info: The version whose limits hold.
        call: Makes an RPC.
    """
    parts = batch.parts(info.limits)
    starts = np.concatenate(([0], np.cumsum(batch.ragged.lengths, dtype=np.int64)))
    room = asyncio.Semaphore(IN_FLIGHT)

    async def ask(part: tuple[int, int], of_version: int) -> pb.ClassifyResponse:
        async with room:
            try:
                return await call(batch.request(model, of_version, *part, int(starts[part[0]])))
            except UnrollError as error:
                # The server numbers the sequences of the request, the caller those of the call.
                raise renumbered(error, numbers[slice(*part)]) from error.__cause__

    answers = await _together([ask(part, version) for part in parts])
    newest = max((answer.version for answer in answers), default=0)
    older = [index for index, answer in enumerate(answers) if answer.version != newest]
    for index, answer in zip(older, await _together([ask(parts[i], newest) for i in older]), strict=True):
        answers[index] = answer
    results = [
        decode(answer, end - start, info, batch.return_final_states)
        for (start, end), answer in zip(parts, answers, strict=True)
    ]
    return _joined(results, info, batch.return_final_states)


async def _together(calls: list[Awaitable[pb.ClassifyResponse]]) -> list[pb.ClassifyResponse]:
    """Awaits all calls; the first failure cancels the others and is raised."""
    if len(calls) == 1:
        return [await calls[0]]
    tasks = [asyncio.ensure_future(call) for call in calls]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def decode(answer: pb.ClassifyResponse, count: int, info: ModelInfo, with_states: bool) -> Classification:
    """Decodes the answer to a request of `count` sequences, 1 or more.

    Raises:
        Internal: it does not fit the request.
    """
    layers = info.num_layers if answer.version == info.version else 0
    try:
        result = Classification(
            labels=list(answer.labels),
            label_indices=np.array(answer.label_indices[:], np.int64),
            probabilities=unpack(answer.probabilities, count, -1),
            logits=unpack(answer.logits, count, -1),
            final_states=tuple(Snapshot.from_proto(state, layers) for state in answer.final_states)
            if with_states
            else None,
            model=answer.model,
            version=answer.version,
        )
    except ValueError as error:
        raise Internal(f"the server's answer can't be read: {error}") from None
    states = result.final_states
    if not len(result.labels) == len(result.label_indices) == count or (states is not None and len(states) != count):
        raise Internal("the server answered for another number of sequences")
    return result


def _joined(results: list[Classification], info: ModelInfo, with_states: bool) -> Classification:
    if len(results) == 1:
        return results[0]
    logits = [result.logits for result in results] or [np.empty((0, info.output_size), np.float32)]
    probabilities = [result.probabilities for result in results] or [np.empty((0, len(info.class_labels)), np.float32)]
    indices = [result.label_indices for result in results] or [np.empty(0, np.int64)]
    return Classification(
        labels=[label for result in results for label in result.labels],
        label_indices=np.concatenate(indices),
        probabilities=join(probabilities),
        logits=join(logits),
        final_states=tuple(state for result in results for state in result.final_states or ()) if with_states else None,
        model=results[0].model if results else info.name,
        version=results[0].version if results else info.version,
    )
