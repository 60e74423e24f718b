"""Sequences that the page offers: files given on the command line, and files that the reader brings."""

import asyncio
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from unroll_proto.sequences import SUFFIXES, Sequence, SequenceError, read_sequences
from unroll_web.page.frames import pack_values

MOST_SEQUENCES = 500
"""Sequences of a file that are offered."""
MOST_VALUES = 4_000_000
"""Numbers of a file that are kept, 16 MB."""


@dataclass(frozen=True, slots=True)
class Source:
    """A file of sequences.

    Attributes:
        name: Name that the page shows: the file's.
        sequences: Its sequences, up to the limits.
    """

    name: str
    sequences: tuple[Sequence, ...]

    @property
    def features(self) -> int:
        """Features of a timestep; 0 without sequences."""
        return self.sequences[0].values.shape[1] if self.sequences else 0

    def describe(self) -> dict[str, Any]:
        """Returns what a list of sequences shows."""
        rows = [{"id": each.id, "label": each.label, "steps": len(each.values)} for each in self.sequences]
        return {"name": self.name, "features": self.features, "sequences": rows}


class Sources:
    """Files of sequences by name, each read when it is first asked for.

    Args:
        files: The files; of two with the same name, the first counts.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self._files = {path.name: path for path in reversed(list(files))}
        self._read: dict[str, Source] = {}

    async def list(self) -> list[dict[str, Any]]:
        """Describes every file; one that can't be read has its `error`."""
        found = []
        for name in sorted(self._files):
            try:
                found.append((await self.get(name)).describe())
            except SequenceError as error:
                found.append({"name": name, "features": 0, "sequences": [], "error": str(error)})
        return found

    async def get(self, name: str) -> Source:
        """Returns a file's sequences.

        Raises:
            KeyError: there is no such file.
            SequenceError: it can't be used.
        """
        if name not in self._read:
            path = self._files[name]
            self._read[name] = Source(name, await asyncio.to_thread(_read, path))
        return self._read[name]


async def read_upload(name: str, content: bytes) -> dict[str, Any]:
    """Reads the bytes of a file in any format of `unroll classify`.

    Args:
        name: The file's name; its suffix decides the format.
        content: The file.

    Returns:
        Its description, as of a source, with the `values` of each sequence in base64.

    Raises:
        SequenceError: it can't be used.
    """
    shown = Path(Path(name).name[-100:] or "file")
    kinds = [suffix.lower() for suffix in shown.suffixes[-2:]]
    compression = kinds.pop() if kinds and kinds[-1] in (".gz", ".zst") else ""
    if not kinds or kinds[-1] not in SUFFIXES:
        *most, last = SUFFIXES
        raise SequenceError(shown, f"a file of kind {', '.join(most)} or {last} expected, also with .gz or .zst")
    with tempfile.TemporaryDirectory(prefix="unroll-page-") as folder:
        path = Path(folder, f"upload{kinds[-1]}{compression}")
        await asyncio.to_thread(path.write_bytes, content)
        try:
            sequences = await asyncio.to_thread(_read, path)
        except SequenceError as error:
            raise SequenceError(shown, str(error).removeprefix(f"{path}: ")) from None
    source = Source(str(shown), sequences).describe()
    for row, sequence in zip(source["sequences"], sequences, strict=True):
        row["values"] = pack_values(sequence.values)
    return source


def _read(path: Path) -> tuple[Sequence, ...]:
    kept: list[Sequence] = []
    size = 0
    for sequence in islice(read_sequences(path), MOST_SEQUENCES):
        size += sequence.values.size
        if size > MOST_VALUES:
            if not kept:
                raise SequenceError(path, f"{sequence.values.size} numbers in a sequence, {MOST_VALUES} at most", row=1)
            break
        kept.append(sequence)
    if not kept:
        raise SequenceError(path, "no sequences")
    return tuple(kept)
