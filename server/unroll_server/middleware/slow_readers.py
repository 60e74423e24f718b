"""Bounds the answers that callers have not read yet, so that a slow reader delays only itself."""

from collections import Counter
from typing import Any

from unroll_engine.errors import OverloadedError
from unroll_server import caller
from unroll_server.middleware import CallContext
from unroll_server.telemetry.metrics import Metrics

SMALL_BYTES = 4 * 1024
"""Least size of a counted answer: `--max-concurrent-calls` smaller ones do no harm."""
CONNECTION_BYTES = 64 * 2**20
"""Most bytes of unread answers of one connection; one larger answer may wait alone."""
TOTAL_BYTES = 512 * 2**20
"""Most bytes of all unread answers, beyond one answer of each connection."""
REASON = "UNREAD_ANSWERS"
RETRY_AFTER = 1.0
"""Seconds after which a caller that has not read its answers may retry."""


class SlowReaders:
    """Refuses calls of a connection while too many answers wait on it to be read.

    A caller with one call at a time is never refused. Streams bound their own answers: see api/native/stream.py.

    Args:
        metrics: Counts refusals.

    Attributes:
        unread: Bytes of unread answers by connection; empty if there are none.
    """

    def __init__(self, metrics: Metrics) -> None:
        self.unread: Counter[str] = Counter()
        self._metrics = metrics.server
        self._total = 0

    def check(self, connection: str, size: int = 0) -> None:
        """Checks that an answer of `size` bytes may wait on a connection.

        Raises:
            OverloadedError: too many bytes wait there already.
        """
        waiting = self.unread.get(connection, 0)
        if waiting and (waiting + size > CONNECTION_BYTES or self._total + size > TOTAL_BYTES):
            self._metrics.refused("unread")
            problem = f"{waiting} bytes of answers wait to be read on this connection"
            raise OverloadedError(problem, RETRY_AFTER, REASON)

    def hold(self, context: CallContext, size: int) -> None:
        """Counts an answer of a call until it is read, or its caller has left.

        Raises:
            OverloadedError: too many bytes wait there already, and the call may still be refused.
        """
        connection = context.peer()
        # Checked again, now that the size is known: many calls may have begun when nothing waited. But a caller that is
        # refused assumes that nothing was done, and retries.
        if not caller.current.get().committed:
            self.check(connection, size)
        self.unread[connection] += size
        self._total += size

        def release(_: Any) -> None:
            self._total -= size
            self.unread[connection] -= size
            if not self.unread[connection]:
                del self.unread[connection]

        context.add_done_callback(release)
