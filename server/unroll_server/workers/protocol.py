"""The protocol between a supervisor and its workers: their one report, and their exit codes.

A worker's standard input is a pipe that closes when the supervisor ends. Its standard output takes one report. SIGTERM
makes it drain. Operators' calls reach it by gRPC, on its private admin listener.
"""

from typing import NamedTuple, Self

DRAINED = 0
"""The worker drained on a signal, or ended on one before it served."""
UNDRAINED = 1
"""The worker cancelled calls at the end of the drain timeout."""
REFUSED = 2
"""The worker can't serve as configured, as it reported."""
FAILED = 3
"""The worker failed by a bug, which it logged."""


END = b"\0"
"""Ends a report."""
MAX_REPORT_BYTES = 2**26


class Report(NamedTuple):
    """Outcome of a worker's start.

    Attributes:
        serves: True if the worker serves.
        text: The models that it serves; the reason if it can't.
    """

    serves: bool
    text: str

    def encode(self) -> bytes:
        """Returns the report as bytes."""
        return f"{'serves' if self.serves else 'refuses'} {self.text}".encode() + END

    @classmethod
    def decode(cls, raw: bytes) -> Self:
        """Parses the bytes of `encode`."""
        kind, _, text = raw.removesuffix(END).decode().partition(" ")
        return cls(kind == "serves", text)
