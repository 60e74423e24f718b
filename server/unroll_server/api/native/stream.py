"""One call of Unroll: many sequences share a stream, each is answered in order, and none waits for another."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from functools import partial

from unroll_engine.errors import InvalidRequestError, RequestError, SequenceStateError
from unroll_engine.readout import check_has_state
from unroll_engine.snapshots import decode_snapshot
from unroll_proto.v1 import unroll_pb2 as pb
from unroll_server import caller
from unroll_server.api.data_plane import DataPlane, decode_chunk, resolve_model
from unroll_server.api.native.answers import AnswerQueue, Write
from unroll_server.api.native.joiner import ChunkJoiner
from unroll_server.api.native.sequence import StreamSequence
from unroll_server.api.streams import RequestStream
from unroll_server.config import MAX_KEY_BYTES
from unroll_server.identity.quotas import Quotas
from unroll_server.sequence import ReplayWindow
from unroll_server.status import status_of

MAX_UNANSWERED = 256
"""Most messages of one stream that are read and not yet answered; beyond it the stream is not read."""
MAX_UNANSWERED_BYTES = 2**25
"""Most bytes of those messages; one message may exceed it."""
_ACTIONS = "one of open, chunk, take_snapshot, close, chunks expected"


class Stream(RequestStream):
    """Answers the requests of one call.

    There are no tasks for sequences or messages: the engine calls the sequence back, which continues.

    Args:
        plane: Finds the models and runs them.
        quotas: Bounds the open sequences of each identity, over all its streams.
        joiner: Runs short chunks, with those of other streams.
    """

    def __init__(self, plane: DataPlane, quotas: Quotas, joiner: ChunkJoiner) -> None:
        super().__init__()
        self._plane = plane
        self._quotas = quotas
        self._joiner = joiner
        self._identity = caller.current.get().identity
        # Open sequences by key, and closed ones with waiting messages.
        self._sequences: dict[str, StreamSequence] = {}
        self._open = 0
        self._window = ReplayWindow()
        self._unanswered = 0
        self._unanswered_bytes = 0
        # Set whenever fewer messages are unanswered, or there is room for answers again.
        self._progress = asyncio.Event()
        self._answers = AnswerQueue(self._progress.set)
        # One for all sequences: each access to a method makes an object.
        self._on_answered = self._answered
        # True if the server drained before it read the `open` of some sequence.
        self._unopened = False

    async def run(self, requests: AsyncIterator[pb.UnrollRequest], write: Write) -> None:
        """See RequestStream."""
        serving = asyncio.create_task(self.serve(requests))
        try:
            await self._answers.write_until(serving, write)
            serving.result()
        finally:
            serving.cancel()
            try:
                await asyncio.gather(serving, return_exceptions=True)
            finally:  # the call can be cancelled again while this waits
                for sequence in self._sequences.values():
                    self._close(sequence)
                self._sequences.clear()
                # A cycle until then.
                del self._on_answered

    async def all_answered(self) -> None:
        """See RequestStream."""
        while self._unanswered:
            await self._until_progress()

    def close_sequences(self) -> None:
        """See RequestStream: every open sequence ends with its snapshot."""
        for sequence in self._sequences.values():
            self._answers.put(sequence.closing(pb.SequenceClosed.REASON_DRAINING))

    def is_complete(self, half_closed: bool) -> bool:
        """See RequestStream; a caller that has not half-closed has the snapshots of all its sequences."""
        return not self._unopened

    async def read(self, requests: AsyncIterator[pb.UnrollRequest]) -> None:
        """See RequestStream."""
        # A stream that begins while the server drains opens nothing.
        self._unopened = self.draining.is_set()
        async for request in requests:
            if self.draining.is_set():
                self._unopened |= request.HasField("open")
                continue
            if request.HasField("chunks"):
                await self._take_batch(request)
            else:
                self._take(request, request.ByteSize())
            while (
                self._unanswered >= MAX_UNANSWERED
                or self._unanswered_bytes >= MAX_UNANSWERED_BYTES
                or not self._answers.has_room()
            ):
                await self._until_progress()

    async def _until_progress(self) -> None:
        self._progress.clear()
        await self._progress.wait()

    async def _take_batch(self, request: pb.UnrollRequest) -> None:
        """Answers chunks of many sequences; skips the remaining ones once the stream drains."""
        chunks, most = request.chunks, self._plane.limits.max_open_sequences
        count = len(chunks.keys)
        if not 1 <= count <= most or not count == len(chunks.first_steps) == len(chunks.values):
            problem = f"{count} keys, {len(chunks.first_steps)} first_steps, {len(chunks.values)} values, "
            error = InvalidRequestError(f"{problem}as many of each expected, 1 to {most}", "chunks")
            self._answers.put(pb.UnrollResponse(key=request.key, error=status_of(error)))
            return
        # As lists: each access to a repeated field makes an object.
        for key, first_step, values in zip([*chunks.keys], [*chunks.first_steps], [*chunks.values], strict=True):
            size = len(key) + len(values)
            sequence = self._sequences.get(key)
            if sequence and not sequence.pending and sequence.join(first_step, values, size, in_batch=True):
                self._unanswered += 1
                self._unanswered_bytes += size
            else:
                chunk = pb.Chunk(first_step=first_step, values=values)
                self._take(pb.UnrollRequest(key=key, chunk=chunk), size, in_batch=True)
            while not self._answers.has_room():
                await self._until_progress()
                if self.draining.is_set():
                    return

    def _take(self, request: pb.UnrollRequest, size: int, in_batch: bool = False) -> None:
        """Answers a message, or puts it behind others of its sequence."""
        self._unanswered += 1
        self._unanswered_bytes += size
        sequence = self._sequences.get(request.key)
        if sequence is None or not (sequence.busy or sequence.pending):
            self._answer(sequence, request, size, in_batch)
        else:
            if sequence.pending is None:
                sequence.pending = deque()
            sequence.pending.append((request, size, in_batch))

    def _answer(self, sequence: StreamSequence | None, request: pb.UnrollRequest, size: int, in_batch: bool) -> None:
        """Answers a message for a sequence, or for a key without one, at once or when its chunk is computed."""
        try:
            if request.WhichOneof("action") == "open":
                self._answer_open(sequence, request)
            elif sequence is None or sequence.closed:
                self._refuse(request)
            else:
                self._answer_next(sequence, request, size, in_batch)
                if sequence.busy:
                    return
        except RequestError as error:
            self._answers.put(pb.UnrollResponse(key=request.key, error=status_of(error)))
        self._count_answered(size)

    def _answered(self, sequences: list[StreamSequence]) -> None:
        """Records that the chunks of some sequences are answered."""
        self._unanswered -= len(sequences)
        self._unanswered_bytes -= sum([sequence.size for sequence in sequences])
        self._progress.set()
        for sequence in sequences:
            if sequence.pending:
                self._answer_pending(sequence.key)

    def _answer_pending(self, key: str) -> None:
        """Answers the messages that wait for a key, until a chunk runs or there is no room."""
        while (sequence := self._sequences.get(key)) and sequence.pending and not sequence.busy:
            if not self._answers.has_room():
                self._answers.when_room(partial(self._answer_pending, key))
                return
            request, size, in_batch = sequence.pending.popleft()
            if not sequence.pending:
                sequence.pending = None
                if sequence.closed:
                    del self._sequences[key]
            self._answer(sequence, request, size, in_batch)

    def _count_answered(self, size: int) -> None:
        self._unanswered -= 1
        self._unanswered_bytes -= size
        self._progress.set()

    def _answer_open(self, before: StreamSequence | None, request: pb.UnrollRequest) -> None:
        key, opening, limits = request.key, request.open, self._plane.limits
        _check_key(key)
        if before and not before.closed:
            raise SequenceStateError("a sequence is open under this key", "key")
        if self._open >= limits.max_open_sequences:
            problem = f"{self._open} sequences are open on this stream, {limits.max_open_sequences} allowed"
            raise InvalidRequestError(problem, "open")
        name, number, state = opening.model, opening.version, None
        if opening.HasField("initial_state"):
            field = "open.initial_state"
            version = resolve_model(self._plane.catalog, opening.initial_state, name, number, field, "open.model")
            state = decode_snapshot(opening.initial_state, version.spec, field)
        else:
            version = self._plane.catalog.find(name, number, "open.model")
        check_has_state(version.spec, "open.model")
        self._quotas.open_sequence(self._identity)
        self._open += 1
        sequence = StreamSequence(
            key,
            opening,
            state,
            self._plane.engine,
            self._joiner,
            version,
            self._window,
            self._answers,
            self._on_answered,
        )
        if before:
            sequence.pending = before.pending
        self._sequences[key] = sequence
        opened = pb.SequenceOpened(
            model=version.key.name,
            version=version.key.version,
            step=sequence.step,
            bundle=version.bundle,
            max_chunks_bytes=limits.max_message_bytes,
        )
        self._answers.put(pb.UnrollResponse(key=key, opened=opened))

    def _answer_next(self, sequence: StreamSequence, request: pb.UnrollRequest, size: int, in_batch: bool) -> None:
        """Answers a message for an open sequence."""
        action = request.WhichOneof("action")
        if action == "chunk":
            first_step, raw = request.chunk.first_step, request.chunk.values
            if not sequence.join(first_step, raw, size, in_batch):
                values = decode_chunk(raw, sequence.model.spec, self._plane.limits, "chunk.values")
                sequence.answer_chunk(first_step, values, size)
        elif action == "take_snapshot":
            snapshot = sequence.snapshot()
            self._answers.put(pb.UnrollResponse(key=request.key, snapshot=snapshot), snapshot.ByteSize())
        elif action == "close":
            closed = sequence.closing(pb.SequenceClosed.REASON_CLOSED)
            self._close(sequence)
            if not sequence.pending:
                del self._sequences[sequence.key]
            self._answers.put(closed, closed.ByteSize())
        else:
            raise InvalidRequestError(_ACTIONS, "action")

    def _close(self, sequence: StreamSequence) -> None:
        if not sequence.closed:
            sequence.close()
            self._open -= 1
            self._quotas.close_sequence(self._identity)

    @staticmethod
    def _refuse(request: pb.UnrollRequest) -> None:
        """Refuses a message for a sequence that is not open."""
        _check_key(request.key)
        if request.WhichOneof("action") is None:
            raise InvalidRequestError(_ACTIONS, "action")
        raise SequenceStateError(f"no sequence {request.key!r} is open on this stream", "key")


def _check_key(key: str) -> None:
    size = len(key.encode())
    if not 1 <= size <= MAX_KEY_BYTES:
        raise InvalidRequestError(f"{size} bytes, 1 to {MAX_KEY_BYTES} allowed", "key")
