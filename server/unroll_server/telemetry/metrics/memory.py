"""Float64 numbers by kind and name, in the memory of a process or in files that workers share."""

from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from unroll_server.telemetry.metrics import shared

Figures = NDArray[np.float64]


class Memory:
    """The numbers of a process, and their sums over all processes.

    Args:
        folder: Folder of the files that workers share, so that counts outlive their worker; None for this process's
            memory.
        worker: Number of the worker; a replacement continues the counts of the dead worker.
        gauges: Places of the gauges, by kind. A gauge starts at 0 with its process and ends with it.
        living: Returns the numbers of the living workers; None for all.
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
        """Returns numbers [size] of this process, writable; called once for each kind and name.

        Args:
            kind: Kind of the numbers, without a dot.
            name: Name of what they count.
            size: Number of them, the same for all of a kind.
        """
        label = f"{kind}.{name}"
        if self._folder is None:
            self._own[label] = bytearray(8 * size)
            return memoryview(self._own[label]).cast("d")
        if self._shared is None:
            # Created at the first count: a process that only sums needs no file.
            self._shared = shared.Shared(self._folder, self._worker)
            for other, figures in self._shared.records.items():
                for place in self._gauges.get(other.partition(".")[0], ()):
                    figures[place] = 0.0
        return self._shared.of(label, size)

    def sums(self, kind: str, size: int) -> dict[str, Figures]:
        """Returns the numbers [size] of a kind by name, summed over all workers; gauges over the living ones."""
        living = None if self._living is None else frozenset(self._living())
        gauges = list(self._gauges.get(kind, ()))
        sums: dict[str, Figures] = {}
        for worker, name, figures in self.of_kind(kind, size):
            if living is not None and worker not in living:
                figures[gauges] = 0.0
            sums[name] = sums[name] + figures if name in sums else figures
        return sums

    def of_kind(self, kind: str, size: int) -> Iterator[tuple[int, str, Figures]]:
        """Yields worker, name and a copy of the numbers [size] of a kind, of all workers."""
        for worker, label, figures in self._all():
            each, _, name = label.partition(".")
            if each == kind and len(figures) == size:
                yield worker, name, figures

    def _all(self) -> Iterator[tuple[int, str, Figures]]:
        if self._folder is None:
            # A copy, since the event loop may add others meanwhile.
            return ((self._worker, label, np.frombuffer(bytearray(own))) for label, own in list(self._own.items()))
        return shared.read(self._folder)
