"""Answers that a sequence waits for: one per message; that to a chunk arrives in one or more pieces."""

from __future__ import annotations

import asyncio
from collections import deque
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from unroll_client._arrays import join, unpack
from unroll_client._errors import DeadlineExceeded, Internal, UnrollError
from unroll_client._types import ModelInfo, Steps
from unroll_proto.v1 import unroll_pb2 as pb


class Message(Enum):
    """The messages of a sequence, by the event that answers them."""

    OPEN = "opened"
    CHUNK = "steps"
    SNAPSHOT = "snapshot"
    CLOSE = "closed"


class Answer:
    """The answer to one message, filled by the stream's reader and awaited by one caller.

    The message can be sent again, to another server. Parts of the answer that the caller has are then dropped.

    Attributes:
        message: Kind of the message.
        first_step: Number of a chunk's first timestep.
        count: A chunk's timesteps; else 0.
        values: A chunk's values; else empty.
        doomed: True if a message before it was refused, so that the server will refuse it as well.
        repeated: True if it was sent more than once.
    """

    def __init__(self, message: Message, first_step: int = 0, count: int = 0, values: bytes = b"") -> None:
        self.message = message
        self.first_step = first_step
        self.count = count
        self.values = values
        self.doomed = False
        self.repeated = False
        self._next_step = first_step  # of this sending
        self._seen = first_step  # of all of them
        self._answered = False
        self._received: deque[pb.UnrollResponse] = deque()
        self._error: UnrollError | None = None
        self._arrived = asyncio.Event()

    @property
    def end(self) -> int:
        """Number of the timestep after a chunk's last."""
        return self.first_step + self.count

    @property
    def complete(self) -> bool:
        """True if the whole answer has arrived since the message was last sent."""
        return self._next_step == self.end if self.message is Message.CHUNK else self._answered

    @property
    def known(self) -> bool:
        """True if the whole answer has arrived, from one server or several."""
        return self._seen == self.end if self.message is Message.CHUNK else self._answered

    @property
    def drained(self) -> bool:
        """True if the whole answer has arrived and was taken by the caller."""
        return self.known and not self._received

    @property
    def refused(self) -> bool:
        """True if the message failed."""
        return self._error is not None

    def again(self) -> None:
        """Records that the message is sent again, so that its answer starts over."""
        self.repeated = True
        self._next_step = self.first_step

    def request(self, key: str) -> pb.UnrollRequest:
        """Returns the message, for the sequence with a key."""
        match self.message:
            case Message.CHUNK:
                return pb.UnrollRequest(key=key, chunk=pb.Chunk(first_step=self.first_step, values=self.values))
            case Message.SNAPSHOT:
                return pb.UnrollRequest(key=key, take_snapshot=pb.TakeSnapshot())
            case Message.CLOSE:
                return pb.UnrollRequest(key=key, close=pb.CloseSequence())
        raise AssertionError(f"'{self.message.name}' is sent by ResumableSequence")

    def take(self, response: pb.UnrollResponse) -> bool:
        """Adds a response of the server; returns False if it is not part of this answer.

        The first new piece can begin with steps that the caller has already.
        """
        if response.WhichOneof("event") != self.message.value:
            return False
        if self.message is Message.CHUNK:
            steps = response.steps
            if steps.first_step != self._next_step or not 1 <= steps.count <= self.end - self._next_step:
                return False
            self._next_step += steps.count
            if self._next_step <= self._seen:
                return True
            self._seen = self._next_step
        self._answered = True
        self._received.append(response)
        self._arrived.set()
        return True

    def fail(self, error: UnrollError) -> None:
        """Fails the answer; pieces that arrived before can still be taken."""
        self._error = error
        self._arrived.set()

    async def next(self, timeout: float | None) -> pb.UnrollResponse:  # noqa: ASYNC109 (becomes DeadlineExceeded)
        """Waits for the next piece.

        Raises:
            DeadlineExceeded: it did not arrive within `timeout` seconds.
            UnrollError: the message failed.
        """
        if not self._received and self._error is None:
            try:
                async with asyncio.timeout(timeout):
                    await self._arrived.wait()
            except TimeoutError:
                raise DeadlineExceeded(f"no '{self.message.value}' within {timeout:g} s") from None
        if self._received:
            response = self._received.popleft()
            if not self._received and self._error is None:
                self._arrived.clear()
            return response
        assert self._error is not None
        raise self._error


def decode_steps(message: pb.Steps, opening: pb.OpenSequence, every: int, info: ModelInfo) -> Steps:
    """Reads a run of steps.

    Raises:
        Internal: the number of values does not fit the steps.
    """
    first, end = message.first_step, message.first_step + message.count
    # Step s is reported where s + 1 divides by `every`: the first such is the next multiple of it, less one.
    steps = np.arange(-(-(first + 1) // every) * every - 1, end, every, dtype=np.int64)
    try:
        return Steps(
            first_step=first,
            count=message.count,
            steps=steps,
            states=unpack(message.states, len(steps), info.hidden_size) if opening.return_states else None,
            # A step model has outputs instead of states.
            logits=unpack(message.logits, len(steps), info.output_size)
            if opening.return_logits or not info.hidden_size
            else None,
            _outputs=info.outputs,
        )
    except ValueError as error:
        raise Internal(f"the server's answer can't be read: {error}") from None


def since(steps: Steps, first_step: int) -> Steps:
    """Cuts off the steps before `first_step`."""
    dropped = first_step - steps.first_step
    if not dropped:
        return steps
    rows = slice(int(np.searchsorted(steps.steps, first_step)), None)
    return Steps(
        first_step=first_step,
        count=steps.count - dropped,
        steps=steps.steps[rows],
        states=None if steps.states is None else steps.states[rows],
        logits=None if steps.logits is None else steps.logits[rows],
        _outputs=steps._outputs,
    )


def joined(parts: list[Steps]) -> Steps:
    """Joins consecutive runs of steps."""
    if len(parts) == 1:
        return parts[0]
    return Steps(
        first_step=parts[0].first_step,
        count=sum(part.count for part in parts),
        steps=np.concatenate([part.steps for part in parts]),
        states=_joined([part.states for part in parts]),
        logits=_joined([part.logits for part in parts]),
        _outputs=parts[0]._outputs,
    )


def _joined(parts: list[NDArray[np.float32] | None]) -> NDArray[np.float32] | None:
    arrays = [part for part in parts if part is not None]
    return join(arrays) if arrays else None
