"""Float64 numbers by kind and name: in this process's memory, or in files that the workers of a server share."""

import mmap
import os
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from urllib.parse import quote, unquote

import numpy as np
from numpy.typing import NDArray

Figures = NDArray[np.float64]


class Memory:
    """Where a process keeps its numbers, and the sum over all processes.

    Args:
        folder: Where workers share their numbers, in a file for each worker, kind and name, so that what a worker
            counted outlives it. None: in this process's memory alone.
        worker: The worker's number; one that takes a dead one's place counts on in its files.
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
        self._own: dict[tuple[str, str], mmap.mmap | bytearray] = {}

    def of(self, kind: str, name: str, size: int) -> "memoryview[float]":
        """The numbers [size] of this process, to be written to; asked for once each.

        Args:
            kind: What they are, without a dot.
            name: Whose they are.
            size: How many; the same for all of a kind.
        """
        self._own[kind, name] = memory = self._memory(kind, name, 8 * size)
        figures = memoryview(memory).cast("d")
        for place in self._gauges.get(kind, ()):
            figures[place] = 0.0
        return figures

    def _memory(self, kind: str, name: str, size: int) -> mmap.mmap | bytearray:
        if self._folder is None:
            return bytearray(size)
        with (self._folder / f"{self._worker}.{kind}.{quote(name, safe='')}").open("a+b") as file:
            os.ftruncate(file.fileno(), size)
            return mmap.mmap(file.fileno(), size)

    def sums(self, kind: str, size: int) -> dict[str, Figures]:
        """The numbers [size] of a kind by name, summed over all workers; gauges over those that live."""
        if self._folder is None:
            return {name: np.frombuffer(bytes(memory)) for (each, name), memory in self._own.items() if each == kind}
        living = None if self._living is None else frozenset(self._living())
        gauges = list(self._gauges.get(kind, ()))
        sums: dict[str, Figures] = {}
        for file in sorted(self._folder.iterdir()):
            worker, each, quoted = file.name.split(".", 2)
            # A worker that starts has made its file, but not yet given it its size.
            if each != kind or len(content := file.read_bytes()) != 8 * size:
                continue
            figures = np.frombuffer(content).copy()
            if living is not None and int(worker) not in living:
                figures[gauges] = 0.0
            name = unquote(quoted)
            sums[name] = sums[name] + figures if name in sums else figures
        return sums
