"""Classify: as many RPCs as the server's limits ask for, some at a time, their answers joined in order."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from collections.abc import Sequence as Listing
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from unroll_client._arrays import FLOAT32, Ragged, invalid, join, pack, unpack
from unroll_client._errors import Internal
from unroll_client._snapshot import Snapshot
from unroll_client._types import Classification, Limits, ModelInfo
from unroll_proto.v1 import unroll_pb2 as pb

# RPCs of one call that are under way at a time: enough to keep a server busy while answers travel.
IN_FLIGHT = 4
# Of a message besides values, lengths and states: the names and the framing of fields.
_ENVELOPE_BYTES = 512
# A length as a varint, and the framing of an initial state.
_SEQUENCE_BYTES = 16

Call = Callable[[pb.ClassifyRequest], Awaitable[pb.ClassifyResponse]]


@dataclass(frozen=True, slots=True)
class Batch:
    """What one call of `classify` was given, checked."""

    ragged: Ragged
    states: tuple[pb.Snapshot, ...]
    return_final_states: bool

    @classmethod
    def make(
        cls,
        sequences: Listing[ArrayLike],
        initial_states: Listing[Snapshot | None] | None,
        return_final_states: bool,
    ) -> Batch:
        """Checks and packs.

        Raises:
            InvalidArgument: a sequence can't be used, or there is not one initial state a sequence.
        """
        ragged = pack(sequences)
        if initial_states is None:
            return cls(ragged, (), return_final_states)
        if len(initial_states) != len(ragged.lengths):
            what = f"{len(initial_states)} states for {len(ragged.lengths)} sequences"
            raise invalid("initial_states", what)
        states = tuple(pb.Snapshot() if state is None else state.to_proto() for state in initial_states)
        return cls(ragged, states, return_final_states)

    def request(self, model: str, version: int, start: int, end: int, first_value: int) -> pb.ClassifyRequest:
        """The message for the sequences `start` to `end - 1`, whose values begin at the row `first_value`."""
        lengths = self.ragged.lengths[start:end]
        return pb.ClassifyRequest(
            model=model,
            version=version,
            lengths=lengths.tolist(),
            values=self.ragged.values[first_value : first_value + int(lengths.sum())].tobytes(),
            initial_states=self.states[start:end],
            return_final_states=self.return_final_states,
        )

    def parts(self, limits: Limits) -> list[tuple[int, int]]:
        """Cuts the batch into ranges of sequences that fit one message each.

        Raises:
            InvalidArgument: one sequence alone is over a limit.
        """
        lengths, values = self.ragged.lengths, self.ragged.values
        long = np.flatnonzero(lengths > limits.max_steps) if limits.max_steps else np.empty(0, np.int64)
        if len(long):
            what = f"{lengths[long[0]]} steps, the server takes {limits.max_steps}"
            raise invalid(f"sequences[{long[0]}]", what)
        sizes = lengths * (values.shape[1] * FLOAT32.itemsize) + _SEQUENCE_BYTES
        if self.states:
            sizes += np.fromiter((state.ByteSize() for state in self.states), np.int64, len(sizes))
        room = (limits.max_message_bytes or np.iinfo(np.int64).max) - _ENVELOPE_BYTES
        large = np.flatnonzero(sizes > room)
        if len(large):
            what = f"{sizes[large[0]]} bytes, the server takes messages of {limits.max_message_bytes}"
            raise invalid(f"sequences[{large[0]}]", what)
        ends = np.cumsum(sizes)
        most = limits.max_sequences or len(sizes)
        parts, start, sent = [], 0, 0
        while start < len(sizes):
            end = min(int(np.searchsorted(ends, sent + room, side="right")), start + most)
            parts.append((start, end))
            start, sent = end, int(ends[end - 1])
        return parts


async def classify(batch: Batch, model: str, version: int, info: ModelInfo, call: Call) -> Classification:
    """Classifies a batch by one RPC or several.

    Where a new version came up in between, the parts that an older one answered are asked for again, so that one
    version answers all.
    """
    parts = batch.parts(info.limits)
    starts = np.concatenate(([0], np.cumsum(batch.ragged.lengths)))
    room = asyncio.Semaphore(IN_FLIGHT)

    async def ask(part: tuple[int, int], of_version: int) -> pb.ClassifyResponse:
        async with room:
            return await call(batch.request(model, of_version, *part, int(starts[part[0]])))

    answers = await _together([ask(part, version) for part in parts])
    newest = max((answer.version for answer in answers), default=0)
    older = [index for index, answer in enumerate(answers) if answer.version != newest]
    for index, answer in zip(older, await _together([ask(parts[i], newest) for i in older]), strict=True):
        answers[index] = answer
    return _joined(parts, answers, info, batch.return_final_states)


async def _together(calls: list[Awaitable[pb.ClassifyResponse]]) -> list[pb.ClassifyResponse]:
    """Awaits all; the first failure cancels the others and is raised."""
    if len(calls) == 1:
        return [await calls[0]]
    tasks = [asyncio.ensure_future(call) for call in calls]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _joined(
    parts: list[tuple[int, int]], answers: list[pb.ClassifyResponse], info: ModelInfo, with_states: bool
) -> Classification:
    classes = len(info.class_labels)
    logits = [np.empty((0, info.output_size), np.float32)]
    probabilities = [np.empty((0, classes), np.float32)]
    labels: list[str] = []
    indices: list[int] = []
    states: list[Snapshot] = []
    try:
        for (start, end), answer in zip(parts, answers, strict=True):
            logits.append(unpack(answer.logits, end - start, -1))
            probabilities.append(unpack(answer.probabilities, end - start, -1))
            labels += answer.labels
            indices += answer.label_indices
            if with_states:
                layers = info.num_layers if answer.version == info.version else 0
                states += [Snapshot.from_proto(state, layers) for state in answer.final_states]
    except ValueError as error:
        raise Internal(f"the server's answer can't be read: {error}") from None
    if not len(labels) == len(indices) == sum(end - start for start, end in parts) or (
        with_states and len(states) != len(labels)
    ):
        raise Internal("the server answered for another number of sequences")
    return Classification(
        labels=labels,
        label_indices=np.array(indices, dtype=np.int64),
        probabilities=join(probabilities[1:] or probabilities),
        logits=join(logits[1:] or logits),
        final_states=tuple(states) if with_states else None,
        model=answers[0].model if answers else info.name,
        version=answers[0].version if answers else info.version,
    )
