"""One call of Unroll: many sequences over one stream, each in its own order, none waiting for another."""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing

from unroll_proto.v1 import unroll_pb2 as pb
from unroll_server.catalog import Catalog
from unroll_server.codec import MAX_KEY_BYTES, decode_chunk, decode_snapshot, encode, encode_snapshot
from unroll_server.config import Limits
from unroll_server.engine import Engine
from unroll_server.errors import InvalidRequestError, RequestError, SequenceStateError
from unroll_server.interceptors import status_of
from unroll_server.sequence import Sequence

MAX_UNANSWERED = 256
"""Messages of one stream that are read and not yet answered; past it the stream is not read."""
MAX_UNSENT = 64
"""Answers of one stream that wait for a slow reader; past it its sequences wait."""
LINGER = 1.0
"""Seconds that a draining stream listens to a caller that has not half-closed it."""


class _Slot:
    """What a key stands for: its sequence, if open, and the messages that wait for it."""

    __slots__ = ("busy", "pending", "sequence")

    def __init__(self) -> None:
        self.sequence: Sequence | None = None
        self.pending: deque[pb.UnrollRequest] = deque()
        self.busy = False


class Stream:
    """Reads the requests of one call and yields the responses.

    An idle sequence costs its state and no task: a task runs for a key only while it has messages to answer.

    Args:
        catalog: The models.
        engine: What runs them.
        limits: What one call may carry.
    """

    def __init__(self, catalog: Catalog, engine: Engine, limits: Limits) -> None:
        self._catalog = catalog
        self._engine = engine
        self._limits = limits
        self._slots: dict[str, _Slot] = {}
        self._open = 0
        self._unanswered = asyncio.Semaphore(MAX_UNANSWERED)
        self._out: asyncio.Queue[pb.UnrollResponse | Exception | None] = asyncio.Queue(MAX_UNSENT)
        self._serving: set[asyncio.Task[None]] = set()
        self._draining = asyncio.Event()

    def drain(self) -> None:
        """Takes no more messages. What was read is answered, then every open sequence ends with its snapshot."""
        self._draining.set()

    async def responses(self, requests: AsyncIterator[pb.UnrollRequest]) -> AsyncGenerator[pb.UnrollResponse, None]:
        """Yields the answers until the caller has half-closed and all it sent is answered, or the stream drains."""
        runner = asyncio.create_task(self._run(requests))
        try:
            while isinstance(item := await self._out.get(), pb.UnrollResponse):
                yield item
            if item:
                raise item
        finally:
            runner.cancel()
            await asyncio.gather(runner, return_exceptions=True)

    async def _run(self, requests: AsyncIterator[pb.UnrollRequest]) -> None:
        failure: Exception | None = None
        try:
            async with asyncio.TaskGroup() as tasks:
                reader = tasks.create_task(self._read(requests, tasks))
                draining = tasks.create_task(self._draining.wait())
                await asyncio.wait({reader, draining}, return_when=asyncio.FIRST_COMPLETED)
                if self._draining.is_set():
                    await self._say_goodbye()
                    # A caller whose write fails may never see the answers that are under way to it (grpc.aio drops
                    # them), so it is listened to until it has heard.
                    await asyncio.wait({reader}, timeout=LINGER)
                    reader.cancel()
                draining.cancel()
        except Exception as error:
            failure = error
        await self._out.put(failure)

    async def _say_goodbye(self) -> None:
        if self._serving:
            await asyncio.wait(self._serving)
        for key, slot in self._slots.items():
            if slot.sequence:
                await self._out.put(_closed(key, slot.sequence, pb.SequenceClosed.REASON_DRAINING))

    async def _read(self, requests: AsyncIterator[pb.UnrollRequest], tasks: asyncio.TaskGroup) -> None:
        async for request in requests:
            if self._draining.is_set():
                continue
            slot = self._slots.setdefault(request.key, _Slot())
            slot.pending.append(request)
            if not slot.busy:
                slot.busy = True
                task = tasks.create_task(self._serve(request.key, slot))
                self._serving.add(task)
                task.add_done_callback(self._serving.discard)
            await self._unanswered.acquire()

    async def _serve(self, key: str, slot: _Slot) -> None:
        """Answers the messages of a key until none waits."""
        while slot.pending:
            request = slot.pending.popleft()
            try:
                async with aclosing(self._answer(key, slot, request)) as responses:
                    async for response in responses:
                        await self._out.put(response)
            except RequestError as error:
                await self._out.put(pb.UnrollResponse(key=key, error=status_of(error)))
            self._unanswered.release()
        slot.busy = False
        if not slot.sequence:
            del self._slots[key]

    async def _answer(
        self, key: str, slot: _Slot, request: pb.UnrollRequest
    ) -> AsyncGenerator[pb.UnrollResponse, None]:
        if not 1 <= len(key.encode()) <= MAX_KEY_BYTES:
            raise InvalidRequestError(f"{len(key.encode())} bytes, 1 to {MAX_KEY_BYTES} allowed", "key")
        action = request.WhichOneof("action")
        if action == "open":
            slot.sequence = self._opened(slot, request.open)
            spec = slot.sequence.model.spec
            opened = pb.SequenceOpened(model=spec.key.name, version=spec.key.version, step=slot.sequence.step)
            yield pb.UnrollResponse(key=key, opened=opened)
            return
        if action is None:
            raise InvalidRequestError("one of open, chunk, take_snapshot, close expected", "action")
        sequence = slot.sequence
        if sequence is None:
            raise SequenceStateError(f"no sequence {key!r} is open on this stream", "key")
        if action == "chunk":
            chunk = request.chunk
            values = decode_chunk(chunk, sequence.model.spec, self._limits)
            async with aclosing(sequence.run(chunk.first_step, values)) as progress:
                async for part in progress:
                    steps = pb.Steps(first_step=chunk.first_step + part.offset, count=part.steps)
                    if part.states is not None:
                        steps.states = encode(part.states)
                    if part.logits is not None:
                        steps.logits = encode(part.logits)
                    yield pb.UnrollResponse(key=key, steps=steps)
        elif action == "take_snapshot":
            snapshot = encode_snapshot(sequence.model.spec, sequence.step, sequence.state)
            yield pb.UnrollResponse(key=key, snapshot=snapshot)
        else:
            slot.sequence = None
            self._open -= 1
            yield _closed(key, sequence, pb.SequenceClosed.REASON_CLOSED)

    def _opened(self, slot: _Slot, request: pb.OpenSequence) -> Sequence:
        if slot.sequence:
            raise SequenceStateError("a sequence is open under this key", "key")
        if self._open >= self._limits.max_open_sequences:
            problem = f"{self._open} sequences are open on this stream, {self._limits.max_open_sequences} allowed"
            raise InvalidRequestError(problem, "open")
        resumes = request.HasField("initial_state")
        version = request.version or (request.initial_state.version if resumes else 0)
        model = self._catalog.find(request.model, version, "open.model")
        state = decode_snapshot(request.initial_state, model.spec, "open.initial_state") if resumes else None
        self._open += 1
        return Sequence(
            self._engine,
            model,
            request.initial_state.step,
            state,
            every=request.every or 1,
            states=request.return_states,
            logits=request.return_logits,
        )


def _closed(key: str, sequence: Sequence, reason: "pb.SequenceClosed.Reason.ValueType") -> pb.UnrollResponse:
    snapshot = encode_snapshot(sequence.model.spec, sequence.step, sequence.state)
    return pb.UnrollResponse(key=key, closed=pb.SequenceClosed(reason=reason, snapshot=snapshot))
