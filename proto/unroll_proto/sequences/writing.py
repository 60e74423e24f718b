"""Writers of all formats that can be read; a file is written completely or not at all."""

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any, Final

import numpy as np

from unroll_proto.files import replacing
from unroll_proto.sequences.checks import ID, LABEL, SEQUENCE, Reading, check_name, check_split
from unroll_proto.sequences.files import ARROW_MISSING, Source
from unroll_proto.sequences.types import Columns, Sequence, SequenceError


def write_sequences(path: Path, sequences: Iterable[Sequence]) -> int:
    """Writes a .parquet, .jsonl, .ndjson, .npz or .ts file; npz and .ts hold all sequences in memory meanwhile.

    Labels and ids are written as strings. npz and .ts take labels of all sequences or of none. A .ts file has no room
    for splits and ids, and its labels have no spaces and no ':'.

    Returns:
        Number of sequences.

    Raises:
        SequenceError: the suffix is unknown, a sequence couldn't be read again, or the format can't hold the sequences.
    """
    writer = _WRITERS.get(path.suffix.lower())
    if writer is None:
        raise SequenceError(path, f"a file of kind {', '.join(_WRITERS)} expected")
    count = 0

    def checked() -> Iterator[Sequence]:
        nonlocal count
        reading = Reading(Source(str(path)), Columns(), None, 1, 1)
        for count, sequence in enumerate(sequences, 1):
            reading.check(sequence.values, count, SEQUENCE)
            check_name(str(path), sequence.id, count, ID)
            check_name(str(path), sequence.label, count, LABEL)
            check_split(str(path), sequence.split, count)
            yield sequence

    with replacing(path) as file:
        writer(path, file, checked())
    return count


def _write_jsonl(_: Path, file: IO[bytes], sequences: Iterable[Sequence]) -> None:
    for sequence in sequences:
        # The digits of the float64 value read back to the same float32.
        record: dict[str, Any] = {"id": sequence.id, "sequence": sequence.values.tolist()}
        if sequence.label is not None:
            record["label"] = sequence.label
        if sequence.split is not None:
            record["split"] = sequence.split
        file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")


def _write_parquet(path: Path, file: IO[bytes], sequences: Iterable[Sequence]) -> None:
    try:
        from unroll_proto.sequences.arrow import write_parquet
    except ModuleNotFoundError:
        raise SequenceError(path, ARROW_MISSING.format("Parquet")) from None
    write_parquet(file, sequences)


def _write_npz(path: Path, file: IO[bytes], sequences: Iterable[Sequence]) -> None:
    group = list(sequences)
    arrays: dict[str, Any] = {
        "values": np.concatenate([sequence.values for sequence in group]) if group else np.empty((0, 1), np.float32),
        "lengths": np.array([len(sequence.values) for sequence in group], dtype=np.int64),
        "ids": np.array([sequence.id for sequence in group], dtype=str),
        # An empty split means that there is none.
        "splits": np.array([sequence.split or "" for sequence in group], dtype=str),
    }
    labels = [sequence.label for sequence in group if sequence.label is not None]
    if labels and len(labels) != len(group):
        raise SequenceError(path, "some sequences have a label and some don't")
    if labels:
        arrays["labels"] = np.array(labels, dtype=str)
    np.savez_compressed(file, **arrays)


def _write_ts(path: Path, file: IO[bytes], sequences: Iterable[Sequence]) -> None:
    group = list(sequences)
    labels = {sequence.label for sequence in group}
    names = sorted(label for label in labels if label is not None)
    if names and None in labels:
        raise SequenceError(path, "some sequences have a label and some don't")
    for name in names:
        if not name or ":" in name or name != "".join(name.split()):
            raise SequenceError(path, f"a label of a .ts file has no spaces and no ':', got {name!r}")
    dimensions = group[0].values.shape[1] if group else 1
    lines = [
        f"@problemName {'_'.join(path.stem.split())}",
        "@timeStamps false",
        "@missing false",
        f"@univariate {str(dimensions == 1).lower()}",
        f"@dimensions {dimensions}",
        f"@equalLength {str(len({len(sequence.values) for sequence in group}) == 1).lower()}",
        " ".join(["@classLabel true", *names]) if names else "@classLabel false",
        "@data",
    ]
    for sequence in group:
        features = [",".join(map(repr, feature)) for feature in sequence.values.T.tolist()]
        lines.append(":".join([*features, *([] if sequence.label is None else [sequence.label])]))
    # The file's name may hold bytes that are not UTF-8.
    file.write(("\n".join(lines) + "\n").encode(errors="replace"))


_WRITERS: Final[dict[str, Callable[[Path, IO[bytes], Iterable[Sequence]], None]]] = {
    ".parquet": _write_parquet,
    ".jsonl": _write_jsonl,
    ".ndjson": _write_jsonl,
    ".npz": _write_npz,
    ".ts": _write_ts,
}
