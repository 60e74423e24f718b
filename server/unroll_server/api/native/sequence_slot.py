"""What one key of a stream stands for: a sequence, what it is to report, and the messages that wait for it."""

from collections import deque
from typing import Protocol

from unroll_engine.arrays import to_bytes
from unroll_engine.errors import RequestError
from unroll_engine.models.spec import Float32Array
from unroll_proto.v1 import unroll_pb2 as pb
from unroll_server.repository.version import LoadedVersion
from unroll_server.sequence import PIECE, Sequence
from unroll_server.status import status_of


class Host(Protocol):
    """The stream, as its slots see it."""

    def send(self, response: pb.UnrollResponse, size: int = 0) -> None:
        """Puts an answer, which holds so many bytes of values, into the caller's queue."""

    def expect(self, size: int) -> None:
        """So many bytes of answers are about to be computed; less than 0: not any more."""

    def when_there_is_room(self, slot: "Slot") -> None:
        """Goes on with the chunk of `slot`, or its next message, at once or when the caller has read more."""

    def answered(self, slot: "Slot") -> None:
        """Goes on with the next message of `slot`, whose chunk is answered."""


class Slot:
    """What a key stands for: its sequence, if open, what it is to report, and the messages that wait for it.

    It is the reader of its sequence's chunks.

    Args:
        stream: Where its answers go.
        key: What it stands for.

    Attributes:
        sequence: The sequence, if one is open.
        pending: Messages that wait, with their sizes; None where none do.
        busy: Whether a chunk runs.
        every: Reports every n-th step.
        states: Whether states are reported.
        logits: Whether logits are reported.
        size: Bytes of the message of the chunk that runs.
        left: Its steps that are not yet computed.
        width: Bytes of the answer to a step.
    """

    __slots__ = (
        "_promised",
        "_version",
        "busy",
        "every",
        "key",
        "left",
        "logits",
        "pending",
        "sequence",
        "size",
        "states",
        "stream",
        "width",
    )

    def __init__(self, stream: Host, key: str) -> None:
        self.stream = stream
        self.key = key
        self.sequence: Sequence | None = None
        self.pending: deque[tuple[pb.UnrollRequest, int]] | None = None
        self.busy = False
        self.every = 1
        self.states = False
        self.logits = False
        self.size = 0
        self.left = 0
        self.width = 0
        # Bytes of answers to the piece of the chunk that runs.
        self._promised = 0
        self._version: LoadedVersion | None = None

    def acquire(self, version: LoadedVersion) -> None:
        """Takes a reference to the version of the sequence that opens."""
        version.acquire()
        self._version = version

    def release(self) -> None:
        """Returns the reference, as the sequence closes."""
        assert self._version is not None
        self._version.release()
        self._version = None

    def promise(self) -> None:
        """The next piece of the chunk is on its way."""
        self._promised = min(self.left, PIECE) * self.width // self.every
        self.stream.expect(self._promised)

    def _keep_promise(self) -> None:
        """What was promised is sent, or never will be."""
        self.stream.expect(-self._promised)
        self._promised = 0

    def progressed(self, step: int, count: int, logits: Float32Array, states: Float32Array) -> None:
        """See sequence.Reader."""
        self.left -= count
        if self.every > 1:
            # Reported are the steps s with (s + 1) % every == 0.
            reported = slice(self.every - 1 - step % self.every, None, self.every)
            logits, states = logits[reported], states[reported]
        steps = pb.Steps(first_step=step, count=count)
        size = 0
        if self.states:
            steps.states = to_bytes(states)
            size = states.nbytes
        if self.logits:
            steps.logits = to_bytes(logits)
            size += logits.nbytes
        self.stream.send(pb.UnrollResponse(key=self.key, steps=steps), size)

    def paused(self) -> None:
        """See sequence.Reader."""
        self._keep_promise()
        self.stream.when_there_is_room(self)

    def finished(self) -> None:
        """See sequence.Reader."""
        self._keep_promise()
        self.stream.answered(self)

    def failed(self, error: RequestError) -> None:
        """See sequence.Reader."""
        self._keep_promise()
        error.rename({"values": "chunk.values"})
        self.stream.send(pb.UnrollResponse(key=self.key, error=status_of(error)))
        self.stream.answered(self)
