"""Metrics of an engine that a test reads."""

from collections import Counter

from unroll_engine.observer import NoMetrics


class Counting(NoMetrics):
    """Counts dropped sequences by cause, and the models that are loaded."""

    def __init__(self) -> None:
        self.drops = Counter[str]()
        self.loaded = 0

    def dropped(self, cause: str, sequences: int) -> None:
        self.drops[cause] += sequences

    def serves(self, more: int) -> None:
        self.loaded += more

    def of(self, model: str) -> "Counting":
        return self
