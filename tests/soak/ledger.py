"""Counts of the soak, and its report."""

from collections import Counter
from dataclasses import dataclass, field

import grpc
from rich.table import Table

from unroll_client import UnrollError

HONEST = {"UNAVAILABLE", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED"}
"""Allowed statuses of valid calls while servers are killed and overloaded."""
EXAMPLES = 5
"""Descriptions of wrong answers that are kept."""


@dataclass
class Ledger:
    """Counts of a run.

    Attributes:
        requests: Correctly answered requests, by kind.
        failed: Valid requests that failed, by kind and status.
        faults: Faults injected, by kind.
        wrong: Wrong answers.
        lost: Steps of a stream that were lost, doubled or out of order.
        examples: Descriptions of wrong answers.
    """

    requests: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    wrong: int = 0
    lost: int = 0
    examples: list[str] = field(default_factory=list)

    def right(self, kind: str, count: int = 1) -> None:
        """Counts correctly answered requests."""
        self.requests[kind] += count

    def fault(self, kind: str) -> None:
        """Counts a fault that was injected."""
        self.faults[kind] += 1

    def was_wrong(self, what: str) -> None:
        """Counts a wrong answer."""
        self.wrong += 1
        if len(self.examples) < EXAMPLES:
            self.examples.append(what)

    def check(self, kind: str, holds: bool, what: str) -> None:
        """Counts a request as right or wrong."""
        if holds:
            self.right(kind)
        else:
            self.was_wrong(f"{kind}: {what}")

    def failure(self, kind: str, error: "UnrollError | grpc.aio.AioRpcError") -> None:
        """Counts a valid request that failed; an unexpected status counts as a wrong answer."""
        code = error.code() if isinstance(error, grpc.aio.AioRpcError) else error.code
        name = code.name
        self.failed[f"{kind}: {name}"] += 1
        if name not in HONEST:
            self.was_wrong(f"{kind}: {name}: {error}")


def table(ledger: Ledger, gauges: dict[str, str], seconds: float) -> Table:
    """Returns all counts as rows."""
    result = Table("what", "count", title=f"make soak: {seconds / 60:.1f} minutes")
    sections = [
        [(f"requests: {kind}", f"{count:,}") for kind, count in sorted(ledger.requests.items())],
        [(f"failed honestly: {kind}", f"{count:,}") for kind, count in sorted(ledger.failed.items())],
        [(f"fault: {kind}", f"{count:,}") for kind, count in sorted(ledger.faults.items())],
        [("wrong answers", str(ledger.wrong)), ("lost steps", str(ledger.lost))],
        list(gauges.items()),
    ]
    for section in sections:
        for row in section:
            result.add_row(*row, end_section=row is section[-1])
    return result
