"""Float64 numbers by kind and name: in this process's memory, or in files that the workers of a server share."""

from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from unroll_server.telemetry.metrics import shared

Figures = NDArray[np.float64]


class Memory:
    """Where a process keeps its numbers, and the sum over all processes.

    Args:
        folder: Where workers share their numbers, so that what a worker counted outlives it. None: in this process's
            memory alone.
        worker: The worker's number; one that takes a dead one's place counts on from where that one was.
        gauges: By kind, the places of numbers that tell how things are, not what has happened: they are a process's
            own, end with it, and begin at 0.
        living: Tells the numbers of the workers that live; None for all.
    """

    def __init__(
        self,
        folder: Path | None,
        worker: int,
        gauges: Mapping[str, Collection[int]],
        living: Callable[[], Collection[int]] | None = None,
    ) -> None:
        self._folder = folder
        self._worker = worker
        self._gauges = gauges
        self._living = living
        self._own: dict[str, bytearray] = {}
        self._shared: shared.Shared | None = None

    def of(self, kind: str, name: str, size: int) -> "memoryview[float]":
        """The numbers [size] of this process, to be written to; asked for once each.

        Args:
            kind: What they are, without a dot.
            name: Whose they are.
            size: How many; the same for all of a kind.
        """
        label = f"{kind}.{name}"
        if self._folder is None:
            self._own[label] = bytearray(8 * size)
            return memoryview(self._own[label]).cast("d")
        if self._shared is None:
            # Not before it counts: who only tells the sum makes no file.
            self._shared = shared.Shared(self._folder, self._worker)
            for other, figures in self._shared.records.items():
                for place in self._gauges.get(other.partition(".")[0], ()):
                    figures[place] = 0.0
        return self._shared.of(label, size)

    def sums(self, kind: str, size: int) -> dict[str, Figures]:
        """The numbers [size] of a kind by name, summed over all workers; gauges over those that live."""
        living = None if self._living is None else frozenset(self._living())
        gauges = list(self._gauges.get(kind, ()))
        sums: dict[str, Figures] = {}
        for worker, label, figures in self._all():
            each, _, name = label.partition(".")
            if each != kind or len(figures) != size:
                continue
            if living is not None and worker not in living:
                figures[gauges] = 0.0
            sums[name] = sums[name] + figures if name in sums else figures
        return sums

    def _all(self) -> Iterator[tuple[int, str, Figures]]:
        if self._folder is None:
            # Listed at once: others may be added meanwhile, on the event loop.
            return ((self._worker, label, np.frombuffer(bytes(own))) for label, own in list(self._own.items()))
        return shared.read(self._folder)
