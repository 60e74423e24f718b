"""ResumableSequence: one sequence on the shared stream, which resumes on another server when its own is lost."""

from __future__ import annotations

import asyncio
import copy
import math
import time

from unroll_client._answers import Answer, Message
from unroll_client._backoff import backoff
from unroll_client._client_api import ClientApi
from unroll_client._errors import (
    DeadlineExceeded,
    FailedPrecondition,
    Internal,
    ServerDraining,
    Unavailable,
    UnrollError,
    from_status,
)
from unroll_client._recovery import Recovery
from unroll_client._replay_buffer import ReplayBuffer
from unroll_client._stream import SharedStream
from unroll_client._types import ModelInfo
from unroll_proto.snapshot import Snapshot
from unroll_proto.v1 import unroll_pb2 as pb

# Attempts to open a new sequence while streams are lost.
OPEN_TRIES = 4
# Seconds that a server has to open a sequence again before another one is tried.
REOPEN_TIMEOUT = 5.0

CLOSED = "the sequence is closed"


class ResumableSequence:
    """Carries the messages of one sequence to a server and each answer back once.

    After the loss of its server the sequence is opened again from the last snapshot, on any server, and the messages
    since then are sent again: at once if an answer is due, else with the next message.

    Args:
        api: The client.
        opening: Message that opens the sequence.
        timeout: Seconds to wait for one answer; None for no limit.
        patience: Seconds without progress after a loss until the sequence fails; 0: it fails at once.

    Attributes:
        info: The model, once the sequence is open.
        step: Number of the next timestep to send.
    """

    def __init__(self, api: ClientApi, opening: pb.OpenSequence, timeout: float | None, patience: float) -> None:
        self.info: ModelInfo | None = None
        self.step = opening.initial_state.step
        self._api = api
        self._opening = opening
        self._timeout = timeout
        base = opening.initial_state if opening.HasField("initial_state") else None
        self._replay = ReplayBuffer(base, keeps=patience > 0)
        self._stream: SharedStream | None = None
        self._key = ""
        self._bundle = b""
        self._opened: Answer | None = None  # not None while the sequence is being opened
        self._ready = False  # True if all kept messages were sent
        self._changed = asyncio.Event()
        self._recovery = Recovery(api, patience, self._reopen, self._fail, self._changed.set)
        self._ended: UnrollError | None = None

    @property
    def over(self) -> bool:
        """True if the sequence is not open yet or has ended."""
        return self.info is None or self._ended is not None

    def check(self) -> None:
        """Raises the error that ended the sequence, if it has ended."""
        if self._ended is not None:
            raise copy.copy(self._ended)

    async def open(self) -> None:
        """Opens the sequence unless it was opened before; tries other streams if some are lost meanwhile."""
        self.check()
        deadline = time.monotonic() + (math.inf if self._timeout is None else self._timeout)
        tries = 0
        while self.info is None:
            try:
                await self._open_first()
            except DeadlineExceeded as error:
                raise self._api.explained(error) from None
            except Unavailable as error:
                tries += 1
                pause = backoff(tries)
                more = tries < OPEN_TRIES or (self._api.waits and time.monotonic() + pause < deadline)
                if self._api.closed or not more:
                    raise self._api.explained(error) from error.__cause__
                await asyncio.sleep(pause)

    async def ready(self) -> None:
        """Waits until one more message can be sent; for one task at a time.

        Raises:
            DeadlineExceeded: nothing could be sent within the timeout.
            UnrollError: the sequence ended.
        """
        try:
            async with asyncio.timeout(self._timeout):
                await self._until_ready()
        except TimeoutError:
            raise DeadlineExceeded(f"nothing could be sent within {self._timeout:g} s") from None

    def send(self, message: Message, values: bytes = b"", count: int = 0) -> Answer:
        """Sends a message. Call it after `ready`, without an await in between."""
        answer = Answer(message, self.step, count, values)
        self.step += count
        self._put(answer)
        if self._replay.wants_snapshot and message is Message.CHUNK:
            self._put(Answer(Message.SNAPSHOT, self.step))
        return answer

    def abandon(self) -> None:
        """Ends the sequence here and on the server, without waiting for an answer."""
        self._leave(close=True)
        self.end(FailedPrecondition(CLOSED))

    def end(self, error: UnrollError) -> None:
        """Ends the sequence unless it has ended; pending messages fail."""
        if self._ended is not None:
            return
        self._ended = error
        self._leave()
        self._replay.fail(error)
        self._recovery.cancel()
        self._changed.set()

    def read_snapshot(self, message: pb.Snapshot) -> Snapshot:
        """Decodes a snapshot of the wire.

        Raises:
            Internal: the message is not a valid snapshot.
        """
        try:
            return Snapshot.from_proto(message, self.info.num_layers if self.info else 0)
        except ValueError as error:
            raise Internal(f"the server's answer can't be read: {error}") from None

    # Called by the shared stream.

    def receive(self, response: pb.UnrollResponse) -> None:
        """Processes one answer of the server."""
        try:
            self._receive(response)
        except UnrollError as error:
            self.end(error)

    def lose(self, error: UnrollError) -> None:
        """Records that the stream is lost."""
        self._stream, self._ready, self._recovery.lost = None, False, error
        if self._opened is not None:
            self._opened.fail(error)
        elif self.info is not None and not self._recovery.can_help(error):
            self._fail(error)
        elif self._replay.pending:
            self._recovery.begin()
        self._changed.set()

    def _receive(self, response: pb.UnrollResponse) -> None:
        event = response.WhichOneof("event")
        pending = self._replay.pending
        if event == "closed" and response.closed.reason == pb.SequenceClosed.REASON_DRAINING:
            self._drained(response.closed.snapshot)
        elif self._opened is not None:
            if event == "error":
                self._opened.fail(from_status(response.error))
            elif not self._opened.take(response):
                raise Internal(f"the server sent '{event}' where 'opened' was due")
        elif not pending:
            raise Internal(f"the server sent '{event}' for nothing that was asked")
        elif event == "error":
            self._refused(from_status(response.error))
        else:
            answer = pending[0]
            known = answer.known
            if not answer.take(response):
                raise Internal(f"the server sent '{event}' where '{answer.message.value}' was due")
            if answer.complete:
                self._settle(response)
            if not known or not pending:
                self._recovery.got_on()

    def _settle(self, response: pb.UnrollResponse) -> None:
        answer = self._replay.settle()
        if answer.message is Message.CLOSE:
            self.end(FailedPrecondition(CLOSED))
        elif answer.message is Message.SNAPSHOT:
            if not self._replay.rebase(response.snapshot):
                raise Internal(f"the server sent a snapshot of step {response.snapshot.step}, which was not asked for")
            self._changed.set()

    def _drained(self, message: pb.Snapshot) -> None:
        assert self._stream is not None
        self._stream.retire()
        snapshot = self.read_snapshot(message)
        error = ServerDraining(f"the server is shutting down, at step {snapshot.step}", snapshot)
        self._leave()
        self._replay.rebase(message)
        self.lose(error)

    def _refused(self, error: UnrollError) -> None:
        answer = self._replay.pending[0]
        # A message that one server accepted may meet another one that lacks room: that is a reason to try elsewhere.
        if answer.repeated and (answer.known or self._recovery.can_help(error)):
            self._leave(close=True)
            self.lose(error)
            return
        self._replay.refuse()
        if answer.message is Message.CHUNK and not answer.doomed:
            # The server is still where the chunk began, and refuses the messages behind it as well.
            self.step = answer.first_step
            for behind in self._replay.pending:
                behind.doomed = True
        answer.fail(error)

    def _put(self, answer: Answer) -> None:
        assert self._stream is not None
        self._replay.add(answer)
        self._stream.put(answer.request(self._key))

    def _leave(self, *, close: bool = False) -> None:
        """Leaves the stream; with `close`, also closes the sequence on the server."""
        if self._stream is not None:
            if close:
                self._stream.put(pb.UnrollRequest(key=self._key, close=pb.CloseSequence()))
            self._stream.release(self._key)
        self._stream, self._ready = None, False

    async def _open_first(self) -> None:
        opened = await self._open_on(self._api.shared_stream(), self._timeout)
        info = await self._api.known_model(opened.model, opened.version)
        self.check()
        self.info, self.step, self._bundle = info, opened.step, opened.bundle
        # On every server it stays on this version.
        self._opening.model, self._opening.version = info.name, info.version
        self._ready = self._stream is not None

    async def _open_on(self, stream: SharedStream, timeout: float | None) -> pb.SequenceOpened:  # noqa: ASYNC109 (of an answer)
        await stream.room()
        self._stream, self._key = stream, stream.register(self)
        self._opened = Answer(Message.OPEN)
        stream.put(pb.UnrollRequest(key=self._key, open=self._opening))
        try:
            opened = (await self._opened.next(timeout)).opened
        except BaseException:
            self._leave(close=not self._opened.refused)
            raise
        finally:
            self._opened = None
        if self._stream is not stream:
            raise copy.copy(self._recovery.lost)
        return opened

    async def _until_ready(self) -> None:
        while True:
            self.check()
            self._changed.clear()
            stream = self._stream
            if stream is None or not self._ready:
                self._recovery.begin()
                await self._changed.wait()
            elif self._replay.full:
                await self._changed.wait()
            else:
                try:
                    await stream.room()
                except UnrollError:
                    continue  # The stream is lost, and calls `lose`.
                if self._stream is stream and self._ready:
                    return

    # Resuming on another server.

    async def _reopen(self) -> None:
        """Opens the sequence again and sends the kept messages."""
        stream = self._api.shared_stream()
        if self._replay.base is not None:
            self._opening.initial_state.CopyFrom(self._replay.base)
        try:
            opened = await self._open_on(stream, REOPEN_TIMEOUT)
        except DeadlineExceeded:
            # The server may hang: the next attempt goes to another one.
            stream.retire()
            raise
        if opened.bundle != self._bundle and opened.bundle and self._bundle:
            name = f"{opened.model}/{opened.version}"
            problem = f"the sequence is of {name} with bundle {self._bundle.hex()}, "
            problem += f"served is {name} with bundle {opened.bundle.hex()}"
            self._leave(close=True)
            self.end(FailedPrecondition(problem))
            return
        expected = (self._opening.model, self._opening.version, self._opening.initial_state.step)
        if (opened.model, opened.version, opened.step) != expected:
            self.end(Internal("the server opened another sequence than was asked for"))
            return
        for answer in self._replay.again():
            await stream.room()
            if self._stream is not stream:
                raise copy.copy(self._recovery.lost)
            stream.put(answer.request(self._key))
        self._ready = True
        if not self._replay.pending:
            self._recovery.got_on()

    def _fail(self, error: UnrollError) -> None:
        """Ends the sequence with an error that has its latest snapshot."""
        if self._api.closed:
            error = Unavailable("the client was closed")
        error = copy.copy(self._api.explained(error))
        if error.snapshot is None and self._replay.base is not None:
            error.snapshot = self.read_snapshot(self._replay.base)
        self.end(error)
