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

# Bytes of a chunk message besides the values: key and framing.
_ENVELOPE_BYTES = 256


class AsyncSequence(Uncopied):
    """One sequence that a server computes step by step; made by `AsyncClient.unroll`.

    An async context manager: entering opens the sequence, leaving closes it. Several tasks may send at a time; their
    chunks are consumed in the order of the calls.

    The sequence survives its server. If the server dies, drains or breaks the stream, the sequence resumes on another
    one, or on the same one after its restart. Each step is answered once, in order, with the same bits. If the
    sequence can't resume within the client's `reconnect_timeout`, or a server sends an impossible answer, every
    method raises the same error from then on. The error's `snapshot` is the last known state.

    Args:
        api: The client.
        opening: Message that opens the sequence.
        timeout: Seconds to wait for one answer; None for no limit.
        patience: Seconds to try to resume on another server; 0 to fail at once.
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
        """Number of the next timestep to send. Timesteps that were sent and not refused count, answered or not."""
        return self._sequence.step

    @property
    def model(self) -> str:
        """Name of the model; the requested one until the sequence is open."""
        return self._sequence.info.name if self._sequence.info else self._opening.model

    @property
    def version(self) -> int:
        """Version that the sequence stays on; the requested one until the sequence is open."""
        return self._sequence.info.version if self._sequence.info else self._opening.version

    @property
    def over(self) -> bool:
        """True if the sequence is not open yet or has ended."""
        return self._sequence.over

    async def open(self) -> Self:
        """Opens the sequence on the server; the other methods open it if needed.

        Raises:
            NotFound: the server has no such model.
            FailedPrecondition: the snapshot is of another model.
            UnrollError: the sequence could not be opened otherwise.
        """
        async with self._order:
            await self._sequence.open()
        return self

    async def send(self, chunk: ArrayLike) -> Steps:
        """Sends the next timesteps and waits for the whole answer.

        A chunk over the server's limits is split over several messages. If one of them is refused, those before it
        stay consumed; `step` tells how many.

        Args:
            chunk: [steps, features], 1 step or more, of numbers as in `AsyncClient.classify`.

        Returns:
            Results of exactly these steps.

        Raises:
            InvalidArgument: the chunk can't be used; nothing was consumed.
            ServerDraining: the server is shutting down, and the client does not reconnect. Its `snapshot` is the last
                state.
            DeadlineExceeded: no answer arrived in time. The chunk may have been consumed.
            UnrollError: the chunk was refused, or the stream ended.
        """
        parts = []
        async with aclosing(self.stream(chunk)) as answers:
            async for steps in answers:
                parts.append(steps)  # noqa: PERF401 (an async comprehension would leave aclosing no name)
        return joined(parts)

    async def stream(self, chunk: ArrayLike) -> AsyncGenerator[Steps]:
        """Sends the next timesteps and yields their answers as they are computed.

        Args:
            chunk: [steps, features], as in `send`.

        Yields:
            Runs of steps that cover the chunk, in order and without gaps. Leaving the loop early drops the rest of
            the answer; the chunk is consumed all the same.

        Raises:
            UnrollError: as in `send`.
        """
        for answer in await self._send_chunk(chunk):
            assert self._sequence.info is not None
            due = answer.first_step
            while not answer.drained:
                response = await answer.next(self._timeout)
                steps = decode_steps(response.steps, self._opening, self._every, self._sequence.info)
                # The answer to a chunk that was sent again may be cut elsewhere and begin with known steps.
                yield since(steps, due)
                due = steps.first_step + steps.count

    async def snapshot(self) -> Snapshot:
        """Returns the state after every chunk sent before.

        Raises:
            UnrollError: the stream ended.
        """
        response = await self._ask(Message.SNAPSHOT)
        return self._sequence.read_snapshot(response.snapshot)

    async def close(self) -> Snapshot:
        """Ends the sequence after every chunk sent before, and returns its last state; may be called again.

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
            # The exception matters more than the answer, which could take long.
            self._sequence.abandon()
            return
        try:
            await self.close()
        except UnrollError:
            # All pending answers have arrived or failed, so nothing is lost if the close fails.
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
