"""Classification of a file: reads, asks and writes at the same time, in order and in bounded memory."""

import asyncio
import re
from collections import deque
from collections.abc import AsyncGenerator, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from unroll_client._async_client import AsyncClient
from unroll_client._errors import InvalidArgument
from unroll_client._types import Classification, ModelInfo
from unroll_proto.sequences import Sequence, SequenceError

# Bounds of a batch: large enough to make the call's cost small, small enough to show progress.
BATCH_SEQUENCES = 1024
BATCH_VALUES = 1 << 19
# Batches in flight. Each takes memory, and with several the server never idles.
IN_FLIGHT = 4


@dataclass(slots=True)
class FileBatch:
    """Consecutive sequences of a file."""

    ids: list[str] = field(default_factory=list)
    labels: list[str | None] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    arrays: list[NDArray[np.float32]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.ids)


def batches(sequences: Iterable[Sequence]) -> Iterator[FileBatch]:
    """Gathers sequences into batches of bounded size; no batch is empty."""
    batch, values = FileBatch(), 0
    for sequence in sequences:
        if len(batch) == BATCH_SEQUENCES or (batch.ids and values + sequence.values.size > BATCH_VALUES):
            yield batch
            batch, values = FileBatch(), 0
        batch.ids.append(sequence.id)
        batch.labels.append(sequence.label)
        batch.rows.append(sequence.row)
        batch.arrays.append(sequence.values)
        values += sequence.values.size
    if batch.ids:
        yield batch


async def classified(
    client: AsyncClient, model: ModelInfo, path: Path, source: Iterator[FileBatch]
) -> AsyncGenerator[tuple[FileBatch, Classification]]:
    """Classifies batches, several at a time.

    Args:
        client: Asks the server.
        model: The model version that answers all.
        path: Path of the file, for messages.
        source: The remaining batches of the file; read on another thread.

    Yields:
        Each batch in order, with its results.

    Raises:
        SequenceError: the reader, the model or the server refuses a sequence.
        UnrollError: a call failed.
    """
    waiting: deque[tuple[FileBatch, asyncio.Task[Classification]]] = deque()
    try:
        while (batch := await asyncio.to_thread(next, source, None)) is not None:
            features = batch.arrays[0].shape[1]
            if features != model.input_size:
                what = f"{features} features, model {model.name} has {model.input_size}"
                raise SequenceError(path, what, row=batch.rows[0], column="sequence")
            waiting.append((batch, asyncio.create_task(_ask(client, model, path, batch))))
            if len(waiting) == IN_FLIGHT:
                batch, task = waiting.popleft()
                yield batch, await task
        while waiting:
            batch, task = waiting.popleft()
            yield batch, await task
    finally:
        for _, task in waiting:
            task.cancel()
        await asyncio.gather(*(task for _, task in waiting), return_exceptions=True)


async def _ask(client: AsyncClient, model: ModelInfo, path: Path, batch: FileBatch) -> Classification:
    try:
        return await client.classify(batch.arrays, model=model.name, version=model.version)
    except InvalidArgument as error:
        # The client numbers the sequences of the call, the user those of the file.
        for violation in error.fields:
            if place := re.fullmatch(r"sequences\[(\d+)\]", violation.field):
                row = batch.rows[int(place[1])]
                raise SequenceError(path, violation.description, row=row, column="sequence") from None
        raise
