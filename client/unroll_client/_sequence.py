"""AsyncSequence: one sequence on the shared stream, sent in chunks and answered step by step."""

from __future__ import annotations

import asyncio
import copy
from collections import deque
from collections.abc import AsyncGenerator
from contextlib import aclosing
from types import TracebackType
from typing import Protocol, Self

from numpy.typing import ArrayLike

from unroll_client._answers import Answer, Message, cut, decode_steps, joined
from unroll_client._arrays import pack_chunk
from unroll_client._errors import FailedPrecondition, Internal, ServerDraining, Unavailable, UnrollError, from_status
from unroll_client._snapshot import Snapshot
from unroll_client._stream import SharedStream
from unroll_client._types import ModelInfo, Steps
from unroll_proto.v1 import unroll_pb2 as pb

# Seconds to wait before a sequence is tried to be opened again, when the stream was lost over it.
OPEN_PAUSES = (0.1, 0.2, 0.4)


class Host(Protocol):
    """What a sequence needs of the client that it belongs to."""

    def shared_stream(self) -> SharedStream:
        """The RPC on which new sequences are opened."""

    async def known_model(self, name: str, version: int) -> ModelInfo:
        """Looks a model version up, at best in memory."""


class AsyncSequence:
    """One sequence that a server computes step by step; made by `AsyncClient.unroll`.

    An async context manager: entering opens the sequence, leaving closes it. Several tasks may send at a time;
    their chunks are consumed in the order of the calls. After a failure of the stream, every method raises the
    same error again.
    """

    def __init__(self, host: Host, opening: pb.OpenSequence, timeout: float | None) -> None:
        self._host = host
        self._opening = opening
        self._timeout = timeout
        self._every = max(opening.every, 1)
        self._step = opening.initial_state.step
        self._info: ModelInfo | None = None
        self._stream: SharedStream | None = None
        self._key = ""
        # Messages sent and not yet fully answered; the server answers a sequence's messages in their order.
        self._pending: deque[Answer] = deque()
        self._order = asyncio.Lock()
        self._ended: UnrollError | None = None
        self._closed: Snapshot | None = None

    @property
    def step(self) -> int:
        """Number of the next timestep to send: those sent before it and not refused, answered or not."""
        return self._step

    @property
    def model(self) -> str:
        """Name of the model; the one asked for, until the sequence is open."""
        return self._info.name if self._info else self._opening.model

    @property
    def version(self) -> int:
        """Version that the sequence stays on until it ends; the one asked for, until it is open."""
        return self._info.version if self._info else self._opening.version

    async def open(self) -> Self:
        """Opens the sequence on the server; the other methods do so where it hasn't been done.

        Raises:
            NotFound: the server has no such model.
            FailedPrecondition: the snapshot is of another model.
            UnrollError: anything else.
        """
        async with self._order:
            await self._open()
        return self

    async def send(self, chunk: ArrayLike) -> Steps:
        """Sends the next timesteps and waits for all of their answer.

        A chunk over the server's limits travels as several. Should one of these be refused, those before it
        are consumed all the same; `step` tells.

        Args:
            chunk: [steps, features], any numeric dtype, 1 step or more.

        Returns:
            What was computed for exactly these steps.

        Raises:
            InvalidArgument: the chunk can't be used; nothing was consumed.
            ServerDraining: the server is shutting down; its `snapshot` says how far the sequence got.
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
            assert self._info is not None
            while not answer.drained:
                response = await answer.next(self._timeout)
                yield decode_steps(response.steps, self._opening, self._every, self._info)

    async def snapshot(self) -> Snapshot:
        """Asks for the state after every chunk sent before.

        Raises:
            UnrollError: the stream ended.
        """
        response = await self._ask(Message.SNAPSHOT, pb.UnrollRequest(take_snapshot=pb.TakeSnapshot()))
        return self._read_snapshot(response.snapshot)

    async def close(self) -> Snapshot:
        """Ends the sequence after every chunk sent before, and returns its last state; again if called again.

        Raises:
            UnrollError: the stream ended first.
        """
        if self._closed is None:
            response = await self._ask(Message.CLOSE, pb.UnrollRequest(close=pb.CloseSequence()))
            self._closed = self._read_snapshot(response.closed.snapshot)
        return self._closed

    async def __aenter__(self) -> Self:
        return await self.open()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._stream is None or self._ended is not None or self._closed is not None:
            return
        if error is not None:
            # What went wrong matters more than the answer to this, and waiting for it could take long.
            self._let_go()
            self._end(FailedPrecondition("the sequence is closed"))
            return
        try:
            await self.close()
        except UnrollError:
            # Whoever waited for an answer has got it, or an exception. A close that fails takes nothing away.
            self._end(FailedPrecondition("the sequence is closed"))

    # What follows is the sequence's side of the stream. To survive a lost stream, `lose` would open another from
    # the last snapshot and send again what `_pending` still waits for, instead of ending.

    def receive(self, response: pb.UnrollResponse) -> None:
        """Takes one answer of the server; the shared stream calls this."""
        event = response.WhichOneof("event")
        if event == "closed" and response.closed.reason == pb.SequenceClosed.REASON_DRAINING:
            assert self._stream is not None
            self._stream.retire()
            snapshot = self._read_snapshot(response.closed.snapshot)
            self._end(ServerDraining(f"the server is shutting down, at step {snapshot.step}", snapshot))
        elif not self._pending:
            self._end(Internal(f"the server sent '{event}' for nothing that was asked"))
        elif event == "error":
            answer = self._pending.popleft()
            self._rewind(answer)
            answer.fail(from_status(response.error))
        else:
            answer = self._pending[0]
            if not answer.take(response):
                self._end(Internal(f"the server sent '{event}' where '{answer.message.value}' was due"))
            elif answer.complete:
                self._pending.popleft()
                if answer.message is Message.CLOSE:
                    self._end(FailedPrecondition("the sequence is closed"))

    def lose(self, error: UnrollError) -> None:
        """Takes note that the stream is over; the shared stream calls this."""
        self._end(error)

    def _rewind(self, refused: Answer) -> None:
        """After a refused chunk the server stands where it began, and refuses what was sent behind it as well."""
        if refused.message is not Message.CHUNK or refused.doomed:
            return
        self._step = refused.first_step
        for answer in self._pending:
            answer.doomed = True

    def _end(self, error: UnrollError) -> None:
        if self._ended is not None:
            return
        self._ended = error
        if self._stream is not None:
            self._stream.release(self._key)
        while self._pending:
            self._pending.popleft().fail(copy.copy(error))

    async def _open(self) -> None:
        """Opens the sequence where it isn't; where the stream is lost over it, on another, some times."""
        self._check()
        pauses = iter(OPEN_PAUSES)
        while self._stream is None:
            try:
                await self._open_on(self._host.shared_stream())
            except Unavailable:
                pause = next(pauses, None)
                if pause is None:
                    raise
                await asyncio.sleep(pause)

    async def _open_on(self, stream: SharedStream) -> None:
        await stream.room()
        self._stream, self._key = stream, stream.register(self)
        answer = self._put(Message.OPEN, pb.UnrollRequest(open=self._opening))
        try:
            opened = (await answer.next(self._timeout)).opened
            self._info = await self._host.known_model(opened.model, opened.version)
        except BaseException:
            if not answer.refused:
                self._let_go()
            stream.release(self._key)
            self._pending.clear()
            self._stream = self._ended = None
            raise
        self._step = opened.step

    async def _send_chunk(self, chunk: ArrayLike) -> list[Answer]:
        async with self._order:
            await self._open()
            assert self._stream is not None
            assert self._info is not None
            values = pack_chunk(chunk, self._info.input_size)
            answers = []
            for part in cut(values, self._info):
                await self._stream.room()
                self._check()
                request = pb.UnrollRequest(chunk=pb.Chunk(first_step=self._step, values=part.tobytes()))
                answers.append(self._put(Message.CHUNK, request, len(part)))
                self._step += len(part)
            return answers

    async def _ask(self, message: Message, request: pb.UnrollRequest) -> pb.UnrollResponse:
        async with self._order:
            await self._open()
            assert self._stream is not None
            await self._stream.room()
            self._check()
            answer = self._put(message, request)
        return await answer.next(self._timeout)

    def _put(self, message: Message, request: pb.UnrollRequest, count: int = 0) -> Answer:
        assert self._stream is not None
        request.key = self._key
        answer = Answer(message, self._step, count)
        self._stream.put(request)
        self._pending.append(answer)
        return answer

    def _let_go(self) -> None:
        """Lets the server forget the sequence, without waiting for its answer."""
        if self._stream is not None:
            self._stream.put(pb.UnrollRequest(key=self._key, close=pb.CloseSequence()))

    def _check(self) -> None:
        if self._ended is not None:
            raise copy.copy(self._ended)

    def _read_snapshot(self, message: pb.Snapshot) -> Snapshot:
        try:
            return Snapshot.from_proto(message, self._info.num_layers if self._info else 0)
        except ValueError as error:
            raise Internal(f"the server's answer can't be read: {error}") from None
