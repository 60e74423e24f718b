"""Messages of a stream that wait to be written; chunks of several sequences leave in one."""

from __future__ import annotations

from collections import deque

from unroll_proto.v1 import unroll_pb2 as pb

# Size of the waiting messages from which on senders wait.
FULL_BYTES = 1 << 20
# Largest size of a message with chunks of several sequences.
BATCH_BYTES = 1 << 20
# Largest size of its framing, besides that of its chunks.
_FRAMING_BYTES = 16


class Outbox:
    """Messages in the order in which they were put; those of different sequences may overtake each other.

    Attributes:
        max_batch_bytes: Size of a message with chunks of several sequences that the server takes; 0 for none.
    """

    def __init__(self) -> None:
        self.max_batch_bytes = 0
        self._messages: deque[tuple[pb.UnrollRequest, int]] = deque()
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._messages)

    @property
    def full(self) -> bool:
        """True if senders should wait."""
        return self._bytes >= FULL_BYTES

    def put(self, message: pb.UnrollRequest) -> None:
        """Appends a message."""
        size = message.ByteSize()
        self._messages.append((message, size))
        self._bytes += size

    def clear(self) -> None:
        """Drops every message."""
        self._messages.clear()
        self._bytes = 0

    def take(self) -> pb.UnrollRequest:
        """Removes the next message; if it has a chunk, those of other sequences join it, one of each."""
        message, size = self._messages.popleft()
        self._bytes -= size
        room = min(self.max_batch_bytes, BATCH_BYTES) - _FRAMING_BYTES - size
        if room <= 0 or not message.HasField("chunk"):
            return message
        chunks, keys, left = [message], {message.key}, deque[tuple[pb.UnrollRequest, int]]()
        for other, size in self._messages:
            if other.key not in keys and other.HasField("chunk") and size <= room:
                chunks.append(other)
                room -= size
                self._bytes -= size
            else:
                left.append((other, size))
            keys.add(other.key)
        if len(chunks) == 1:
            return message
        self._messages = left
        batch = pb.ChunkBatch(
            keys=[each.key for each in chunks],
            first_steps=[each.chunk.first_step for each in chunks],
            values=[each.chunk.values for each in chunks],
        )
        return pb.UnrollRequest(chunks=batch)
