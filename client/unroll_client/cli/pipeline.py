"""Classification of a file: reads, computes and writes at the same time, in order and in bounded memory."""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path

from unroll_client._types import Classification
from unroll_client.cli.backends import Backend, RefusedSequenceError
from unroll_proto.sequences import Block, SequenceError

# Blocks in flight. Each takes memory, and with several the backend never idles.
IN_FLIGHT = 4


async def classified(
    backend: Backend, path: Path, source: Iterator[Block]
) -> AsyncGenerator[tuple[Block, Classification]]:
    """Classifies blocks, several at a time.

    Args:
        backend: Computes the classes.
        path: Path of the file, for messages.
        source: The remaining blocks of the file; read on another thread.

    Yields:
        Each block in order, with its results.

    Raises:
        SequenceError: the reader, the model or the server refuses a sequence.
        UnrollError: a call failed.
    """
    waiting: deque[tuple[Block, asyncio.Task[Classification]]] = deque()
    try:
        while (block := await asyncio.to_thread(next, source, None)) is not None:
            features = block.values.shape[1]
            if features != backend.input_size:
                what = f"{features} features, model {backend.name} has {backend.input_size}"
                raise SequenceError(path, what, row=block.rows[0], column="sequence")
            waiting.append((block, asyncio.create_task(_classify(backend, path, block))))
            if len(waiting) == IN_FLIGHT:
                block, task = waiting.popleft()
                yield block, await task
        while waiting:
            block, task = waiting.popleft()
            yield block, await task
    finally:
        for _, task in waiting:
            task.cancel()
        await asyncio.gather(*(task for _, task in waiting), return_exceptions=True)


async def _classify(backend: Backend, path: Path, block: Block) -> Classification:
    try:
        return await backend.classify(block)
    except RefusedSequenceError as error:
        # The backend numbers the sequences of the block, the user those of the file.
        raise SequenceError(path, error.reason, row=block.rows[error.index], column="sequence") from None
