"""ReplayBuffer: the messages of a sequence that may have to be sent again to another server."""

from __future__ import annotations

import copy
from collections import deque

from unroll_client._answers import Answer, Message
from unroll_client._errors import UnrollError
from unroll_proto.v1 import unroll_pb2 as pb

# A snapshot is requested once this much was sent since the last one, which bounds what is computed twice after a loss.
# It costs a small message each way, and an answer of num_layers * hidden_size * 4 bytes.
SNAPSHOT_STEPS = 128
SNAPSHOT_BYTES = 1 << 16
# Values of a sequence that are kept; a caller with more to send waits for the next snapshot.
KEPT_BYTES = 8 << 20


class ReplayBuffer:
    """Messages of one sequence in their order: those answered since the last snapshot, then the pending ones.

    Args:
        base: Snapshot that the sequence begins with; None for the zero state.
        keeps: False if nothing will be sent again; then answered messages are dropped.

    Attributes:
        base: The latest snapshot, or the one that the sequence began with.
        pending: Messages that are sent and not fully answered; the server answers in order.
    """

    def __init__(self, base: pb.Snapshot | None, *, keeps: bool) -> None:
        self.base = base
        self.pending: deque[Answer] = deque()
        self._keeps = keeps
        self._answered: list[Answer] = []
        self._reached = base.step if base is not None else 0
        self._bytes = 0
        self._new_steps = 0
        self._new_bytes = 0

    @property
    def full(self) -> bool:
        """True if nothing more should be sent until a snapshot arrives."""
        return self._keeps and self._bytes > KEPT_BYTES

    @property
    def wants_snapshot(self) -> bool:
        """True if a snapshot should be requested."""
        return self._keeps and (self._new_steps >= SNAPSHOT_STEPS or self._new_bytes >= SNAPSHOT_BYTES)

    def add(self, answer: Answer) -> None:
        """Records a message that is being sent."""
        self.pending.append(answer)
        if answer.message is Message.CHUNK:
            self._bytes += len(answer.values)
            self._new_steps += answer.count
            self._new_bytes += len(answer.values)
        else:
            self._new_steps = self._new_bytes = 0

    def settle(self) -> Answer:
        """Records that the first pending message was answered, and returns it."""
        answer = self.pending.popleft()
        if answer.message is Message.CHUNK:
            self._reached = answer.end
            if self._keeps:
                self._answered.append(answer)
            else:
                self._bytes -= len(answer.values)
        return answer

    def refuse(self) -> Answer:
        """Records that the first pending message was refused, and returns it."""
        answer = self.pending.popleft()
        self._bytes -= len(answer.values)
        return answer

    def rebase(self, snapshot: pb.Snapshot) -> bool:
        """Replaces the answered messages by a snapshot; returns False if the snapshot is of another step."""
        if snapshot.step != self._reached:
            return False
        self.base = snapshot
        self._bytes -= sum(len(answer.values) for answer in self._answered)
        self._answered.clear()
        return True

    def again(self) -> list[Answer]:
        """Makes every kept message pending, and returns them to be sent to a server that begins at `base`."""
        everything = [*self._answered, *self.pending]
        self._answered.clear()
        self.pending = deque(everything)
        self._reached = self.base.step if self.base is not None else 0
        for answer in everything:
            answer.again()
        return everything

    def fail(self, error: UnrollError) -> None:
        """Fails every pending message with its own copy of an error, and drops all."""
        self._answered.clear()
        while self.pending:
            self.pending.popleft().fail(copy.copy(error))
