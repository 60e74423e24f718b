"""AsyncSequence: one sequence on the shared stream, sent in chunks and answered step by step."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from types import TracebackType
from typing import Self

from numpy.typing import ArrayLike

from unroll_client._answers import Answer, Message, decode_steps, joined, since
from unroll_client._arrays import cut, pack_chunk
from unroll_client._client_api import ClientApi
from unroll_client._errors import FailedPrecondition, UnrollError
from unroll_client._resumable import CLOSED, ResumableSequence
from unroll_client._types import Steps
from unroll_client._uncopied import Uncopied
from unroll_proto.snapshot import Snapshot
from unroll_proto.v1 import unroll_pb2 as pb

# Of a chunk message besides the values: key and framing.
_ENVELOPE_BYTES = 256


class AsyncSequence(Uncopied):
    """One sequence that a server computes step by step; made by `AsyncClient.unroll`.

    An async context manager: entering opens the sequence, leaving closes it. Several tasks may send at a time;
    their chunks are consumed in the order of the calls.

    It survives its server: where that dies, drains or breaks the stream off, the sequence goes on at another, or at
    the same one when it is back, and each step is answered once, in order, with the same bits. Where that does not
    come about within the client's `reconnect_timeout`, or the server answers what can't be, every method raises the
    same error from then on; its `snapshot` is the last state that is known.

    Args:
        api: The client.
        opening: How it is opened.
        timeout: Seconds to wait for one answer; None for no limit.
        patience: Seconds to try to go on elsewhere; 0 to fail at once.
    """

    _instead = "send its snapshot(), and open another sequence from it"

    def __init__(self, api: ClientApi, opening: pb.OpenSequence, timeout: float | None, patience: float) -> None:
        self._sequence = ResumableSequence(api, opening, timeout, patience)
        self._opening = opening
        self._timeout = timeout
        self._every = max(opening.every, 1)
        self._order = asyncio.Lock()
        self._closed: Snapshot | None = None

    @property
    def step(self) -> int:
        """Number of the next timestep to send: those sent before it and not refused, answered or not."""
        return self._sequence.step

    @property
    def model(self) -> str:
        """Name of the model; the one asked for, until the sequence is open."""
        return self._sequence.info.name if self._sequence.info else self._opening.model

    @property
    def version(self) -> int:
        """Version that the sequence stays on until it ends; the one asked for, until it is open."""
        return self._sequence.info.version if self._sequence.info else self._opening.version

    @property
    def over(self) -> bool:
        """True if the sequence is not open, not yet or no longer."""
        return self._sequence.over

    async def open(self) -> Self:
        """Opens the sequence on the server; the other methods do so where it hasn't been done.

        Raises:
            NotFound: the server has no such model.
            FailedPrecondition: the snapshot is of another model.
            UnrollError: anything else.
        """
        async with self._order:
            await self._sequence.open()
        return self

    async def send(self, chunk: ArrayLike) -> Steps:
        """Sends the next timesteps and waits for all of their answer.

        A chunk over the server's limits travels as several. Should one of these be refused, those before it
        are consumed all the same; `step` tells.

        Args:
            chunk: [steps, features], 1 step or more, of numbers as in `AsyncClient.classify`.

        Returns:
            What was computed for exactly these steps.

        Raises:
            InvalidArgument: the chunk can't be used; nothing was consumed.
            ServerDraining: the server is shutting down, and the client does not reconnect; its `snapshot` says how
                far the sequence got.
            DeadlineExceeded: no answer came in time. The chunk may be consumed all the same.
            UnrollError: the chunk was refused, or the stream ended.
        """
        parts = []
        async with aclosing(self.stream(chunk)) as answers:
            async for steps in answers:
                parts.append(steps)  # noqa: PERF401 (an async comprehension would leave aclosing no name)
        return joined(parts)

    async def stream(self, chunk: ArrayLike) -> AsyncGenerator[Steps]:
        """Sends the next timesteps and gives their answers as they are computed.

        Args:
            chunk: [steps, features], as in `send`.

        Yields:
            Runs of steps, in order and without gaps, that together cover the chunk. Leaving the loop early drops
            the rest; the chunk is consumed all the same.

        Raises:
            UnrollError: as in `send`.
        """
        for answer in await self._send_chunk(chunk):
            assert self._sequence.info is not None
            due = answer.first_step
            while not answer.drained:
                response = await answer.next(self._timeout)
                steps = decode_steps(response.steps, self._opening, self._every, self._sequence.info)
                # What was sent again may be cut otherwise, and begin with what was answered before.
                yield since(steps, due)
                due = steps.first_step + steps.count

    async def snapshot(self) -> Snapshot:
        """Asks for the state after every chunk sent before.

        Raises:
            UnrollError: the stream ended.
        """
        response = await self._ask(Message.SNAPSHOT)
        return self._sequence.read_snapshot(response.snapshot)

    async def close(self) -> Snapshot:
        """Ends the sequence after every chunk sent before, and returns its last state; again if called again.

        Raises:
            UnrollError: the stream ended first.
        """
        if self._closed is None:
            response = await self._ask(Message.CLOSE)
            self._closed = self._sequence.read_snapshot(response.closed.snapshot)
        return self._closed

    async def __aenter__(self) -> Self:
        return await self.open()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._sequence.over or self._closed is not None:
            return
        if error is not None:
            # What went wrong matters more than the answer to this, and waiting for it could take long.
            self._sequence.abandon()
            return
        try:
            await self.close()
        except UnrollError:
            # Whoever waited for an answer has got it, or an exception. A close that fails takes nothing away.
            self._sequence.end(FailedPrecondition(CLOSED))

    async def _send_chunk(self, chunk: ArrayLike) -> list[Answer]:
        async with self._order:
            await self._sequence.open()
            assert self._sequence.info is not None
            values = pack_chunk(chunk, self._sequence.info.input_size)
            answers: list[Answer] = []
            limits = self._sequence.info.limits
            for part in cut(values, limits.max_steps, limits.max_message_bytes, _ENVELOPE_BYTES):
                await self._sequence.ready()
                if any(answer.refused or answer.doomed for answer in answers):
                    break  # The rest would take the place of the part that was refused.
                answers.append(self._sequence.send(Message.CHUNK, part.tobytes(), len(part)))
            return answers

    async def _ask(self, message: Message) -> pb.UnrollResponse:
        async with self._order:
            await self._sequence.open()
            await self._sequence.ready()
            answer = self._sequence.send(message)
        return await answer.next(self._timeout)
