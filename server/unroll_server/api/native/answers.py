"""Unread answers of one stream."""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable

from unroll_proto.v1 import unroll_pb2 as pb

MAX_UNSENT = 64
"""Most unread answers of one stream; beyond it the sequences wait."""
MAX_UNSENT_BYTES = 2**24
"""Most bytes of those answers and of those being computed; one piece of a chunk may exceed it."""


Write = Callable[[pb.UnrollResponse], Awaitable[None]]
"""Writes an answer; returns when the transport has taken it."""


class AnswerQueue:
    """Queue of answers, bounded in number and in bytes.

    Args:
        on_room: Called when there is room again and no sequence waits for it.

    Attributes:
        bytes: Bytes of values in the answers, and in those that are about to be computed.
    """

    def __init__(self, on_room: Callable[[], None]) -> None:
        self._on_room = on_room
        self._answers: deque[tuple[pb.UnrollResponse, int]] = deque()
        self.bytes = 0
        self._waiting: deque[Callable[[], None]] = deque()
        self._crowded = False
        self._changed = asyncio.Event()

    def put(self, answer: pb.UnrollResponse, size: int = 0) -> None:
        """Appends an answer, which holds `size` bytes of values."""
        self._answers.append((answer, size))
        self.bytes += size
        self._changed.set()

    def has_room(self) -> bool:
        """Returns True if more may be computed. If not, `on_room` will be called."""
        if len(self._answers) < MAX_UNSENT and self.bytes < MAX_UNSENT_BYTES:
            return True
        self._crowded = True
        return False

    def when_room(self, resume: Callable[[], None]) -> None:
        """Calls `resume` at once, or in turn when the caller has read more."""
        if self.has_room():
            resume()
        else:
            self._waiting.append(resume)

    async def write_until(self, last: asyncio.Task[None], write: Write) -> None:
        """Writes answers as they arrive, until the task that appends them is done and all are written."""
        last.add_done_callback(lambda _: self._changed.set())
        while True:
            while self._answers:
                answer, size = self._answers.popleft()
                await write(answer)
                # An answer counts until the transport has taken it.
                self.bytes -= size
                if self._crowded:
                    self._use_room()
            if last.done():
                return
            self._changed.clear()
            await self._changed.wait()

    def _use_room(self) -> None:
        while self._waiting and self.has_room():
            self._waiting.popleft()()
        if not self._waiting and self.has_room():
            self._crowded = False
            self._on_room()
