"""Numbers in files that the workers of a server share, so that counts outlive their worker.

A file begins with the number of bytes in use, int64. Records follow: the lengths of label and numbers, uint32 each; the
label, padded to whole words; the numbers, float64. Records are only added. A file stays mapped, at the cost of one
descriptor, so it has room for many records; unused room takes no memory.
"""

import mmap
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

FILE_BYTES = 2**24
"""Size of a file: room for about 20,000 model versions. A worker that needs more opens another file."""
_WORD = 8
_LENGTHS = struct.Struct("=II")


class Shared:
    """The numbers of one worker, writable.

    Args:
        folder: Folder of the workers' files.
        worker: Number of the worker; a replacement continues in the files of the dead worker.
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
        """Numbers by label, including those of a replaced worker."""
        return self._records

    def of(self, label: str, count: int) -> "memoryview[float]":
        """Returns the numbers [count] of a label, zeros at first; `count` never changes."""
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
        # From now on readers and a replacement of this worker see the record.
        content[:_WORD].cast("q")[0] = begin + size
        return content[place : begin + size].cast("d")

    def _path(self) -> Path:
        return self._folder / f"{self._worker}.{len(self._files)}"

    def _open(self) -> None:
        with self._path().open("a+b") as file:
            os.ftruncate(file.fileno(), FILE_BYTES)
            self._files.append(mmap.mmap(file.fileno(), FILE_BYTES))


def read(folder: Path) -> Iterator[tuple[int, str, NDArray[np.float64]]]:
    """Yields worker, label and a copy of the numbers of every record of all workers."""
    for path in sorted(folder.iterdir()):
        worker = int(path.name.partition(".")[0])
        with path.open("rb") as file:
            # A starting worker may not have set the size of its file yet.
            used = _used(memoryview(file.read(_WORD).ljust(_WORD, b"\0")))
            content = bytes(_WORD) + file.read(max(used - _WORD, 0))
        for label, place, count in _records(memoryview(content)):
            yield worker, label, np.frombuffer(content, np.float64, count, place).copy()


def _used(content: memoryview) -> int:
    used: int = content[:_WORD].cast("q")[0]
    return used


def _records(content: memoryview) -> Iterator[tuple[str, int, int]]:
    """Yields label, place and count of the records in the used bytes of a file."""
    place = _WORD
    while place < len(content):
        length, count = _LENGTHS.unpack_from(content, place)
        place += _LENGTHS.size
        label = bytes(content[place : place + length]).rstrip(b"\0").decode()
        place += length
        yield label, place, count
        place += _WORD * count
