"""The .ts text format of the UCR and UEA archives: a sequence per line, features separated by ':', the label last."""

from collections.abc import Iterator
from dataclasses import dataclass
from io import TextIOWrapper
from typing import IO

import numpy as np

from unroll_proto.sequences.checks import LABEL, SEQUENCE, Reading, check_name
from unroll_proto.sequences.types import Sequence, SequenceError


@dataclass
class _Header:
    """The lines before @data."""

    labelled: bool = False
    labels: frozenset[str] = frozenset()
    dimensions: int | None = None


def read_ts(file: IO[bytes], reading: Reading) -> Iterator[Sequence | SequenceError]:
    """Reads line by line; `row` is the line's number, and the id counts the sequences from 0."""
    header = _Header()
    in_data = False
    index = -1
    # utf-8-sig drops a byte order mark. Comments of old archive files may hold Latin-1 letters.
    for row, raw in enumerate(TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape"), 1):
        line = raw.strip()
        if not line or line.startswith("#"):
            continue
        if in_data:
            index += 1
            if index < reading.skip:
                continue
            try:
                yield _sequence(reading, line, header, row, index)
            except SequenceError as error:
                yield error
        elif line.startswith("@"):
            in_data = _read_header(reading, line, header, row)
        else:
            raise reading.fail(f"a header line that starts with '@' expected, got {line!r:.60}", row)
    if not in_data:
        raise reading.fail("no line '@data'")


def _read_header(reading: Reading, line: str, header: _Header, row: int) -> bool:
    """Processes one header line; returns True for the last one."""
    word, *arguments = line[1:].split() or [""]
    word = word.lower()
    if word == "data":
        return True
    if word == "classlabel":
        header.labelled = _flag(reading, word, arguments, row)
        header.labels = frozenset(arguments[1:])
    elif word in ("timestamps", "targetlabel"):
        if _flag(reading, word, arguments, row):
            raise reading.fail(f"@{word} true: such files can't be read here", row)
    elif word == "univariate":
        if _flag(reading, word, arguments, row):
            header.dimensions = 1
    elif word in ("dimensions", "dimension"):
        if not arguments or not arguments[0].isdecimal() or int(arguments[0]) < 1:
            raise reading.fail(f"@{word}: a number of 1 or more expected, got {arguments}", row)
        header.dimensions = int(arguments[0])
    return False


def _flag(reading: Reading, word: str, arguments: list[str], row: int) -> bool:
    value = arguments[0].lower() if arguments else ""
    if value not in ("true", "false"):
        raise reading.fail(f"@{word}: true or false expected, got {value!r}", row)
    return value == "true"


def _sequence(reading: Reading, line: str, header: _Header, row: int, index: int) -> Sequence:
    try:
        line.encode()
    except UnicodeEncodeError as error:
        what = f"not UTF-8 text: byte {ord(line[error.start]) & 0xFF:#x} at character {error.start}; convert the file"
        raise reading.fail(what, row) from None
    parts = line.split(":")
    names = {}
    if header.labelled:
        label = check_name(reading.source.name, parts.pop().strip(), row, LABEL)
        if not label or (header.labels and label not in header.labels):
            what = f"{label!r:.60} is not in the header" if label else "missing after the last ':'"
            raise reading.fail(what, row, LABEL)
        names[reading.name(LABEL)] = label
    if header.dimensions is not None and len(parts) != header.dimensions:
        raise reading.fail(f"{len(parts)} dimensions, {header.dimensions} expected by the header", row, SEQUENCE)
    if not parts or not any(part.strip() for part in parts):
        raise reading.fail("an empty sequence", row, SEQUENCE)
    if any("?" in part for part in parts):
        raise reading.fail("missing values ('?') can't be used", row, SEQUENCE)
    steps = parts[0].count(",") + 1
    for dimension, part in enumerate(parts):
        if part.count(",") + 1 != steps:
            what = f"dimension {dimension} has {part.count(',') + 1} values, {steps} expected as in dimension 0"
            raise reading.fail(what, row, SEQUENCE)
    try:
        values = np.array(",".join(parts).split(","), dtype=np.float64)
    except ValueError as error:
        raise reading.fail(f"a number expected: {error}", row, SEQUENCE) from None
    return reading.make(index, row, values.reshape(len(parts), steps).T, names, SEQUENCE)
