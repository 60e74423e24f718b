"""One call of Unroll: many sequences over one stream, each in its own order, none waiting for another."""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator

from unroll_engine.async_engine import AsyncEngine
from unroll_engine.errors import InvalidRequestError, RequestError, SequenceStateError
from unroll_engine.snapshots import decode_snapshot, encode_snapshot
from unroll_proto.v1 import unroll_pb2 as pb
from unroll_server import caller
from unroll_server.api.data_plane import resolve_model
from unroll_server.api.native.codec import decode_chunk
from unroll_server.api.native.sequence_slot import Slot
from unroll_server.config import MAX_KEY_BYTES, Limits
from unroll_server.errors import DrainingError
from unroll_server.identity.quotas import OPEN_SEQUENCES, Usage
from unroll_server.repository.catalog import Catalog
from unroll_server.sequence import Repeatable, Sequence
from unroll_server.status import status_of

MAX_UNANSWERED = 256
"""Messages of one stream that are read and not yet answered; past it the stream is not read."""
MAX_UNANSWERED_BYTES = 2**25
"""Bytes of those messages, likewise; one message comes on top."""
MAX_UNSENT = 64
"""Answers of one stream that wait for a slow reader; past it its sequences wait."""
MAX_UNSENT_BYTES = 2**24
"""Bytes of those answers and of those that are being computed, likewise; one piece of a chunk comes on top."""


class Stream:
    """Reads the requests of one call and yields the responses.

    An idle sequence costs its state and little else: there is no task for it, and while a message of it is answered
    there is none either, the engine calls back.

    Args:
        catalog: The models.
        engine: What runs them.
        limits: What one call may carry.
        usage: What the caller's identity has open, over all its streams.
    """

    def __init__(self, catalog: Catalog, engine: AsyncEngine, limits: Limits, usage: Usage) -> None:
        self._catalog = catalog
        self._engine = engine
        self._limits = limits
        self._slots: dict[str, Slot] = {}
        self._open = 0
        self._usage = usage
        self._repeatable = Repeatable()
        self._call = caller.current.get()
        self._owner = self._call.identity
        self._unanswered = 0
        self._unanswered_bytes = 0
        # With their sizes, as far as those matter.
        self._out: deque[tuple[pb.UnrollResponse, int]] = deque()
        self._bytes = 0
        # Who waits for room: slots, and perhaps the reader.
        self._held: deque[Slot] = deque()
        self._crowded = False
        # Set whenever what it stands for may have changed.
        self._written = asyncio.Event()
        self._fewer = asyncio.Event()
        self._draining = asyncio.Event()
        self._linger = 0.0
        # Set if the server drained before it read the `open` of some sequence.
        self._unopened = False

    def drain(self, linger: float) -> None:
        """Takes no more messages. What was read is answered, then every open sequence ends with its snapshot.

        Args:
            linger: Seconds for which the call waits for the caller to half-close before it ends.
        """
        self._linger = linger
        self._draining.set()

    async def responses(self, requests: AsyncIterator[pb.UnrollRequest]) -> AsyncGenerator[pb.UnrollResponse, None]:
        """Yields the answers until the caller has half-closed and all it sent is answered, or the stream drains.

        Raises:
            DrainingError: the stream drained before it opened every sequence, and has answered all that it read.
        """
        runner = asyncio.create_task(self._run(requests))
        runner.add_done_callback(lambda _: self._written.set())
        out = self._out
        try:
            while True:
                while out:
                    response, size = out.popleft()
                    yield response
                    # One that the transport has not taken yet still counts.
                    self._bytes -= size
                    if self._crowded:
                        self._go_on()
                if runner.done():
                    break
                self._written.clear()
                await self._written.wait()
            runner.result()
        finally:
            runner.cancel()
            try:
                await asyncio.gather(runner, return_exceptions=True)
            finally:  # a call can be cancelled once more while this waits
                for slot in self._slots.values():
                    if slot.sequence:
                        slot.sequence.leave()
                        self._usage.give(OPEN_SEQUENCES, self._owner)
                        slot.release()

    def send(self, response: pb.UnrollResponse, size: int = 0) -> None:
        """Puts an answer, which holds so many bytes of values, into the caller's queue."""
        self._out.append((response, size))
        self._bytes += size
        self._written.set()

    def expect(self, size: int) -> None:
        """So many bytes of answers are about to be computed; less than 0: not any more."""
        self._bytes += size

    def when_there_is_room(self, slot: Slot) -> None:
        """Goes on with the chunk of `slot`, or its next message, at once or when the caller has read more."""
        if self._has_room():
            self._resume(slot)
        else:
            self._crowded = True
            self._held.append(slot)

    def answered(self, slot: Slot) -> None:
        """Goes on with the next message of `slot`, whose chunk is answered."""
        slot.busy = False
        self._count_answered(slot.size)
        if slot.pending:
            self.when_there_is_room(slot)
        else:
            slot.pending = None

    def _count_answered(self, size: int) -> None:
        self._unanswered -= 1
        self._unanswered_bytes -= size
        self._fewer.set()

    def _has_room(self) -> bool:
        return len(self._out) < MAX_UNSENT and self._bytes < MAX_UNSENT_BYTES

    async def _run(self, requests: AsyncIterator[pb.UnrollRequest]) -> None:
        # A stream that begins while the server drains opens nothing.
        self._unopened = self._draining.is_set()
        reader = asyncio.create_task(self._read(requests))
        draining = asyncio.create_task(self._draining.wait())
        try:
            await asyncio.wait({reader, draining}, return_when=asyncio.FIRST_COMPLETED)
            if reader.done():
                reader.result()
            while self._unanswered:
                self._fewer.clear()
                await self._fewer.wait()
            if self._draining.is_set():
                for slot in self._slots.values():
                    if slot.sequence:
                        self.send(_closed(slot.key, slot.sequence, pb.SequenceClosed.REASON_DRAINING))
                # A caller whose write fails because the call has ended may never see the answers, nor the status, that
                # are under way to it (grpc.aio drops them), so its messages are still read.
                await asyncio.wait({reader}, timeout=self._linger)
                if self._unopened:
                    raise DrainingError("all of this stream")
        finally:
            reader.cancel()
            draining.cancel()
            await asyncio.gather(reader, draining, return_exceptions=True)

    async def _read(self, requests: AsyncIterator[pb.UnrollRequest]) -> None:
        async for request in requests:
            if self._draining.is_set():
                self._unopened |= request.HasField("open")
                continue
            key = request.key
            slot = self._slots.get(key)
            if slot is None:
                slot = self._slots[key] = Slot(self, key)
            size = request.ByteSize()
            self._unanswered += 1
            self._unanswered_bytes += size
            if slot.busy or slot.pending:
                if slot.pending is None:
                    slot.pending = deque()
                slot.pending.append((request, size))
            else:
                self._serve(slot, request, size)
            while (
                self._unanswered >= MAX_UNANSWERED
                or self._unanswered_bytes >= MAX_UNANSWERED_BYTES
                or not self._has_room()
            ):
                self._crowded = True
                self._fewer.clear()
                await self._fewer.wait()

    def _serve(self, slot: Slot, request: pb.UnrollRequest, size: int) -> None:
        """Answers a message of a slot, and those that wait behind it, until a chunk runs."""
        while True:
            try:
                slot.busy = self._answer(slot, request)
            except RequestError as error:
                self.send(pb.UnrollResponse(key=slot.key, error=status_of(error)))
            if slot.busy:
                slot.size = size
                return
            self._count_answered(size)
            if not slot.pending:
                break
            if not self._has_room():
                self.when_there_is_room(slot)
                return
            request, size = slot.pending.popleft()
        slot.pending = None
        if not slot.sequence:
            self._slots.pop(slot.key, None)

    def _go_on(self) -> None:
        while self._held and self._has_room():
            self._resume(self._held.popleft())
        if not self._held and self._has_room():
            self._crowded = False
            self._fewer.set()

    def _resume(self, slot: Slot) -> None:
        if not slot.busy:
            assert slot.pending
            self._serve(slot, *slot.pending.popleft())
            return
        assert slot.sequence is not None
        try:
            slot.sequence.resume()
        except RequestError as error:
            slot.failed(error)
        else:
            slot.promise()

    def _answer(self, slot: Slot, request: pb.UnrollRequest) -> bool:
        """Answers a message; True where that is still to come."""
        key, action = slot.key, request.WhichOneof("action")
        if action == "open":
            self._check_key(key)
            sequence = slot.sequence = self._opened(slot, request.open)
            spec = sequence.model.spec
            name, version = spec.key
            opened = pb.SequenceOpened(model=name, version=version, step=sequence.step, bundle=spec.bundle)
            self.send(pb.UnrollResponse(key=key, opened=opened))
            return False
        if slot.sequence is None:
            self._check_key(key)
            if action is None:
                raise InvalidRequestError("one of open, chunk, take_snapshot, close expected", "action")
            raise SequenceStateError(f"no sequence {key!r} is open on this stream", "key")
        sequence = slot.sequence
        if action == "chunk":
            chunk = request.chunk
            values = decode_chunk(chunk.values, sequence.model.spec, self._limits)
            sequence.start(chunk.first_step, values, slot)
            slot.left = len(values)
            slot.promise()
            return True
        if action == "take_snapshot":
            snapshot = encode_snapshot(sequence.model.spec, sequence.step, sequence.state)
            self.send(pb.UnrollResponse(key=key, snapshot=snapshot), snapshot.ByteSize())
        elif action == "close":
            slot.sequence = None
            self._open -= 1
            self._usage.give(OPEN_SEQUENCES, self._owner)
            slot.release()
            closed = _closed(key, sequence, pb.SequenceClosed.REASON_CLOSED)
            self.send(closed, closed.ByteSize())
        else:
            raise InvalidRequestError("one of open, chunk, take_snapshot, close expected", "action")
        return False

    @staticmethod
    def _check_key(key: str) -> None:
        if not 1 <= len(key.encode()) <= MAX_KEY_BYTES:
            raise InvalidRequestError(f"{len(key.encode())} bytes, 1 to {MAX_KEY_BYTES} allowed", "key")

    def _opened(self, slot: Slot, request: pb.OpenSequence) -> Sequence:
        if slot.sequence:
            raise SequenceStateError("a sequence is open under this key", "key")
        if self._open >= self._limits.max_open_sequences:
            problem = f"{self._open} sequences are open on this stream, {self._limits.max_open_sequences} allowed"
            raise InvalidRequestError(problem, "open")
        snapshot = request.initial_state if request.HasField("initial_state") else None
        name, version, state = request.model, request.version, None
        if snapshot:
            found = resolve_model(self._catalog, snapshot, name, version, "open.initial_state", "open.model")
            state = decode_snapshot(snapshot, found.spec, "open.initial_state")
        else:
            found = self._catalog.find(name, version, "open.model")
        self._usage.take(OPEN_SEQUENCES, self._owner)
        self._open += 1
        slot.acquire(found)
        slot.every = request.every or 1
        slot.states = request.return_states
        slot.logits = request.return_logits
        slot.width = 4 * (slot.states * found.spec.hidden_size + slot.logits * found.spec.output_size)
        step = request.initial_state.step
        return Sequence(self._engine, found.model, step, state, self._repeatable, self._call)


def _closed(key: str, sequence: Sequence, reason: "pb.SequenceClosed.Reason.ValueType") -> pb.UnrollResponse:
    snapshot = encode_snapshot(sequence.model.spec, sequence.step, sequence.state)
    return pb.UnrollResponse(key=key, closed=pb.SequenceClosed(reason=reason, snapshot=snapshot))
