"""Numbers in files that the workers of a server share: what a worker counted outlives it.

A worker's files begin with the bytes that are in use, int64, and then hold records: the lengths of its label and its
numbers, uint32 each, the label, filled up to whole words, and the numbers, float64. Records are only ever added. A file
stays mapped, at the cost of one descriptor, so it has room for many; what is not in use takes no memory.
"""

import mmap
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

FILE_BYTES = 2**24
"""Of a worker's file: room for some 20,000 model versions. Then there is another one."""
_WORD = 8
_LENGTHS = struct.Struct("=II")


class Shared:
    """The numbers of one worker, to be written to.

    Args:
        folder: Where the workers' files are.
        worker: Its number; one that takes a dead one's place goes on in its files.
    """

    def __init__(self, folder: Path, worker: int) -> None:
        self._folder = folder
        self._worker = worker
        self._files: list[mmap.mmap] = []
        self._records: dict[str, memoryview[float]] = {}
        while self._path().exists():
            self._open()
            words = memoryview(self._files[-1])
            for label, place, count in _records(words[: _used(words)]):
                self._records[label] = words[place : place + _WORD * count].cast("d")

    @property
    def records(self) -> "dict[str, memoryview[float]]":
        """What there is, by label; a worker that takes a dead one's place finds what that one left."""
        return self._records

    def of(self, label: str, count: int) -> "memoryview[float]":
        """The numbers [count] under a label, zeros at first; `count` is the same for all time."""
        if label not in self._records:
            self._records[label] = self._added(label, count)
        return self._records[label]

    def _added(self, label: str, count: int) -> "memoryview[float]":
        name = label.encode()
        name += bytes(-len(name) % _WORD)
        size = _LENGTHS.size + len(name) + _WORD * count
        if not self._files or max(_used(memoryview(self._files[-1])), _WORD) + size > FILE_BYTES:
            self._open()
        content = memoryview(self._files[-1])
        begin = max(_used(content), _WORD)
        place = begin + _LENGTHS.size + len(name)
        _LENGTHS.pack_into(content, begin, len(name), count)
        content[begin + _LENGTHS.size : place] = name
        # Only now is it there, for who reads and for who takes this worker's place.
        content[:_WORD].cast("q")[0] = begin + size
        return content[place : begin + size].cast("d")

    def _path(self) -> Path:
        return self._folder / f"{self._worker}.{len(self._files)}"

    def _open(self) -> None:
        with self._path().open("a+b") as file:
            os.ftruncate(file.fileno(), FILE_BYTES)
            self._files.append(mmap.mmap(file.fileno(), FILE_BYTES))


def read(folder: Path) -> Iterator[tuple[int, str, NDArray[np.float64]]]:
    """Worker, label and a copy of the numbers of every record of all workers."""
    for path in sorted(folder.iterdir()):
        worker = int(path.name.partition(".")[0])
        with path.open("rb") as file:
            # A worker that starts has made its file, but not yet given it its size.
            used = _used(memoryview(file.read(_WORD).ljust(_WORD, b"\0")))
            content = bytes(_WORD) + file.read(max(used - _WORD, 0))
        for label, place, count in _records(memoryview(content)):
            yield worker, label, np.frombuffer(content, np.float64, count, place).copy()


def _used(content: memoryview) -> int:
    used: int = content[:_WORD].cast("q")[0]
    return used


def _records(content: memoryview) -> Iterator[tuple[str, int, int]]:
    """Label, place and count of the records in the bytes in use of a file."""
    place = _WORD
    while place < len(content):
        length, count = _LENGTHS.unpack_from(content, place)
        place += _LENGTHS.size
        label = bytes(content[place : place + length]).rstrip(b"\0").decode()
        place += length
        yield label, place, count
        place += _WORD * count
