"""Ledger: what was sent of a sequence and is not settled, and what another server needs to compute it again."""

from __future__ import annotations

import copy
from collections import deque

from unroll_client._answers import Answer, Message
from unroll_client._errors import UnrollError
from unroll_proto.v1 import unroll_pb2 as pb

# A snapshot is asked for when this much was sent since the last: so much at most is computed again after a loss.
# It costs a small message each way, and an answer of num_layers * hidden_size * 4 bytes.
SNAPSHOT_STEPS = 128
SNAPSHOT_BYTES = 1 << 16
# Values of a sequence that are kept to be sent again; who has more to send waits for the next snapshot.
KEPT_BYTES = 8 << 20


class Ledger:
    """The messages of one sequence, in their order: those that are answered since the last snapshot, then the rest.

    Args:
        base: Where the sequence begins; None is the zero state.
        keeps: Whether anything is to be sent again. If not, nothing is kept that was answered.

    Attributes:
        base: The last snapshot that came, or where the sequence began.
        pending: What was sent and is not fully answered; the server answers a sequence's messages in their order.
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
        """Whether no more should be sent until a snapshot has come."""
        return self._keeps and self._bytes > KEPT_BYTES

    @property
    def wants_snapshot(self) -> bool:
        """Whether it is time to ask for one."""
        return self._keeps and (self._new_steps >= SNAPSHOT_STEPS or self._new_bytes >= SNAPSHOT_BYTES)

    def add(self, answer: Answer) -> None:
        """Takes note of a message that is sent."""
        self.pending.append(answer)
        if answer.message is Message.CHUNK:
            self._bytes += len(answer.values)
            self._new_steps += answer.count
            self._new_bytes += len(answer.values)
        else:
            self._new_steps = self._new_bytes = 0

    def settle(self) -> Answer:
        """Takes note that the first pending message is answered, and returns it."""
        answer = self.pending.popleft()
        if answer.message is Message.CHUNK:
            self._reached = answer.end
            if self._keeps:
                self._answered.append(answer)
            else:
                self._bytes -= len(answer.values)
        return answer

    def refuse(self) -> Answer:
        """Takes note that the first pending message was refused, and returns it."""
        answer = self.pending.popleft()
        self._bytes -= len(answer.values)
        return answer

    def rebase(self, snapshot: pb.Snapshot) -> bool:
        """Takes over the state after all that is answered; False where the snapshot is of another step."""
        if snapshot.step != self._reached:
            return False
        self.base = snapshot
        self._bytes -= sum(len(answer.values) for answer in self._answered)
        self._answered.clear()
        return True

    def again(self) -> list[Answer]:
        """Makes all of it pending, to be sent again in this order to a server that begins at `base`."""
        everything = [*self._answered, *self.pending]
        self._answered.clear()
        self.pending = deque(everything)
        self._reached = self.base.step if self.base is not None else 0
        for answer in everything:
            answer.again()
        return everything

    def fail(self, error: UnrollError) -> None:
        """Fails all that is pending, each with an exception of its own, and keeps nothing."""
        self._answered.clear()
        while self.pending:
            self.pending.popleft().fail(copy.copy(error))
