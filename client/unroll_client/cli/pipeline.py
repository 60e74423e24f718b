"""Classification of files: reads, computes and writes at the same time, in order and in bounded memory."""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

from unroll_client._types import Classification
from unroll_client.cli.backends import Backend, RefusedSequenceError
from unroll_proto.sequences import Block, Columns, Expected, SequenceError, Source, UnreadableError, read_blocks

IN_FLIGHT = 4
"""Blocks in flight, by default. Each takes memory, and with several the backend never idles."""


class Position(NamedTuple):
    """Place between two blocks of the input.

    Attributes:
        source: Index of the file.
        taken: Sequences of it that are done, the refused ones included.
    """

    source: int = 0
    taken: int = 0


BEGIN = Position()


@dataclass
class Input:
    """The input of a run.

    Attributes:
        sources: The files.
        columns: Names of the columns to read.
        tolerant: True to go on after rows and files that can't be used; False to raise.
    """

    sources: Sequence[Source]
    columns: Columns
    tolerant: bool = False

    def described(self) -> dict[str, object]:
        """Returns what a later run must share to go on with this one."""
        files = [[source.name, source.stamp] for source in self.sources]
        return {"files": files, "columns": asdict(self.columns), "tolerant": self.tolerant}

    def blocks(self, backend: Backend, begin: Position) -> Iterator[tuple[Block, Position]]:
        """Reads blocks for a backend, each with the position after it.

        Raises:
            SequenceError: a row or a file can't be used.
        """
        names = backend.feature_names or tuple(str(index) for index in range(backend.input_size))
        expected = Expected(names, f"model {backend.name}")
        for index, source in enumerate(self.sources[begin.source :], begin.source):
            taken = begin.taken if index == begin.source else 0
            try:
                for block in read_blocks(source, *backend.block_size, self.columns, expected, taken):
                    if block.refused and not self.tolerant:
                        raise block.refused[0]
                    taken += block.taken
                    yield block, Position(index, taken)
            except UnreadableError:
                raise
            except SequenceError as error:
                if not self.tolerant:
                    raise
                # The rest of the file.
                yield Block.of([], [error]), Position(index + 1)


async def classified(
    backend: Backend, source: Input, begin: Position = BEGIN, in_flight: int = IN_FLIGHT
) -> AsyncGenerator[tuple[Block, Classification | None, Position]]:
    """Classifies blocks, several at a time.

    Args:
        backend: Computes the classes.
        source: The files; read on another thread.
        begin: Where to begin.
        in_flight: Blocks at a time.

    Yields:
        Each block in order, without the sequences that were refused; the results, None if all were; and the position
        after the block.

    Raises:
        SequenceError: the reader, the model or the server refuses a sequence.
        UnrollError: a call failed.
    """
    blocks = source.blocks(backend, begin)
    waiting: deque[tuple[Position, asyncio.Task[tuple[Block, Classification | None]]]] = deque()
    try:
        while (read := await asyncio.to_thread(next, blocks, None)) is not None:
            block, after = read
            waiting.append((after, asyncio.create_task(_classify(backend, source, block, after))))
            if len(waiting) == in_flight:
                after, task = waiting.popleft()
                yield *(await task), after
        while waiting:
            after, task = waiting.popleft()
            yield *(await task), after
    finally:
        for _, task in waiting:
            task.cancel()
        await asyncio.gather(*(task for _, task in waiting), return_exceptions=True)


async def _classify(
    backend: Backend, source: Input, block: Block, after: Position
) -> tuple[Block, Classification | None]:
    while len(block):
        try:
            return block, await backend.classify(block)
        except RefusedSequenceError as error:
            # The backend numbers the sequences of the block, the user those of the file.
            file, name = source.sources[after.source].name, source.columns.sequence or "sequence"
            problem = SequenceError(file, error.reason, row=block.rows[error.index], column=name)
            if not source.tolerant:
                raise problem from None
            block = block.without({error.index: problem})
    return block, None
