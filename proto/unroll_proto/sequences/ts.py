"""The .ts text format of the UCR and UEA archives: a sequence per line, features separated by ':', the label last."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from unroll_proto.sequences.checks import LABEL, SequenceChecks, check_name
from unroll_proto.sequences.types import Sequence, SequenceError


@dataclass
class _Header:
    """The lines before @data."""

    labelled: bool = False
    labels: frozenset[str] = frozenset()
    dimensions: int | None = None


def read_ts(path: Path) -> Iterator[Sequence]:
    """Reads line by line; `row` is the line's number, and the id counts the sequences from 0."""
    checks = SequenceChecks(path)
    header = _Header()
    in_data = False
    index = 0
    # utf-8-sig drops a byte order mark. Comments of old archive files may hold Latin-1 letters.
    with path.open(encoding="utf-8-sig", errors="surrogateescape") as lines:
        for row, raw in enumerate(lines, 1):
            line = raw.strip()
            if not line or line.startswith("#"):
                continue
            if in_data:
                yield _sequence(path, line, header, checks, row, index)
                index += 1
            elif line.startswith("@"):
                in_data = _read_header(path, line, header, row)
            else:
                raise SequenceError(path, f"a header line that starts with '@' expected, got {line!r:.60}", row=row)
    if not in_data:
        raise SequenceError(path, "no line '@data'")


def _read_header(path: Path, line: str, header: _Header, row: int) -> bool:
    """Processes one header line; returns True for the last one."""
    word, *arguments = line[1:].split() or [""]
    word = word.lower()
    if word == "data":
        return True
    if word == "classlabel":
        header.labelled = _flag(path, word, arguments, row)
        header.labels = frozenset(arguments[1:])
    elif word in ("timestamps", "targetlabel"):
        if _flag(path, word, arguments, row):
            raise SequenceError(path, f"@{word} true: such files can't be read here", row=row)
    elif word == "univariate":
        if _flag(path, word, arguments, row):
            header.dimensions = 1
    elif word in ("dimensions", "dimension"):
        if not arguments or not arguments[0].isdecimal() or int(arguments[0]) < 1:
            raise SequenceError(path, f"@{word}: a number of 1 or more expected, got {arguments}", row=row)
        header.dimensions = int(arguments[0])
    return False


def _flag(path: Path, word: str, arguments: list[str], row: int) -> bool:
    value = arguments[0].lower() if arguments else ""
    if value not in ("true", "false"):
        raise SequenceError(path, f"@{word}: true or false expected, got {value!r}", row=row)
    return value == "true"


def _sequence(path: Path, line: str, header: _Header, checks: SequenceChecks, row: int, index: int) -> Sequence:
    try:
        line.encode()
    except UnicodeEncodeError as error:
        what = f"not UTF-8 text: byte {ord(line[error.start]) & 0xFF:#x} at character {error.start}; convert the file"
        raise SequenceError(path, what, row=row) from None
    parts = line.split(":")
    label = None
    if header.labelled:
        label = check_name(path, parts.pop().strip(), row, LABEL)
        if not label or (header.labels and label not in header.labels):
            what = f"{label!r:.60} is not in the header" if label else "missing after the last ':'"
            raise SequenceError(path, what, row=row, column=LABEL)
    if header.dimensions is not None and len(parts) != header.dimensions:
        raise checks.fail(f"{len(parts)} dimensions, {header.dimensions} expected by the header", row)
    if not parts or not any(part.strip() for part in parts):
        raise checks.fail("an empty sequence", row)
    if any("?" in part for part in parts):
        raise checks.fail("missing values ('?') can't be used", row)
    steps = parts[0].count(",") + 1
    for dimension, part in enumerate(parts):
        if part.count(",") + 1 != steps:
            what = f"dimension {dimension} has {part.count(',') + 1} values, {steps} expected as in dimension 0"
            raise checks.fail(what, row)
    try:
        values = np.array(",".join(parts).split(","), dtype=np.float64)
    except ValueError as error:
        raise checks.fail(f"a number expected: {error}", row) from None
    values = values.reshape(len(parts), steps).T
    return Sequence(id=str(index), values=checks.values(values, row), label=label, split=None, row=row)
