"""JSON Lines: an object per line with the key `sequence`, and optionally `label`, `split` and `id`."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unroll_proto.sequences.checks import ID, LABEL, SEQUENCE, SPLIT, SequenceChecks, check_name, check_split
from unroll_proto.sequences.types import Sequence, SequenceError

# A Python float, since it compares with integers of any size.
MAX_FLOAT32 = float(np.finfo(np.float32).max)


def read_jsonl(path: Path) -> Iterator[Sequence]:
    """Reads line by line; empty lines are skipped, and `row` is the line's number."""
    checks = SequenceChecks(path)
    index = 0
    with path.open("rb") as lines:
        for row, line in enumerate(lines, 1):
            if not line.strip():
                continue
            record = _parse(path, line, row)
            values = checks.values(_array(record.get(SEQUENCE), line, checks, row), row)
            name = check_name(path, record.get(ID), row, ID)
            yield Sequence(
                id=str(index) if name is None else name,
                values=values,
                label=check_name(path, record.get(LABEL), row, LABEL),
                split=check_split(path, record.get(SPLIT), row),
                row=row,
            )
            index += 1


def _parse(path: Path, line: bytes, row: int) -> dict[str, Any]:
    try:
        record = json.loads(line.decode("utf-8-sig" if row == 1 else "utf-8"))
    except UnicodeDecodeError as error:
        raise SequenceError(path, f"not UTF-8 text: {error.reason} at byte {error.start}", row=row) from None
    except (ValueError, RecursionError) as error:
        raise SequenceError(path, f"not JSON: {error}", row=row) from None
    if not isinstance(record, dict):
        raise SequenceError(path, f"a JSON object expected, got {_kind(record)}", row=row)
    if SEQUENCE not in record:
        raise SequenceError(path, f"missing; the keys are {sorted(record)!r:.200}", row=row, column=SEQUENCE)
    return record


def _array(value: object, line: bytes, checks: SequenceChecks, row: int) -> NDArray[np.generic]:
    """Converts nested lists to an array [steps, features]; the error names the place that is not a number."""
    if isinstance(value, list) and value:
        try:
            array = np.asarray(value)
        except (ValueError, OverflowError):
            array = np.empty(0, dtype=object)
        # numpy takes true and false for numbers; they are rare enough for a closer check.
        if array.ndim == 2 and array.dtype.kind in "iuf" and not (b"true" in line or b"false" in line):
            return array
    return np.array(_checked(value, checks, row), dtype=np.float64).reshape(-1, _width(value))


def _checked(value: object, checks: SequenceChecks, row: int) -> list[list[float]]:
    """Finds the first bad value, for the message; slow, so only used after a check has failed."""
    if not isinstance(value, list):
        raise checks.fail(f"a list of lists of numbers expected, got {_kind(value)}", row)
    if not value:
        raise checks.fail("an empty sequence", row)
    for step, features in enumerate(value):
        if not isinstance(features, list):
            raise checks.fail(f"[{step}] is {_kind(features)}, a list of numbers expected", row)
        if len(features) != len(value[0]):
            raise checks.fail(f"[{step}] has {len(features)} features, {len(value[0])} expected as in [0]", row)
        for feature, number in enumerate(features):
            if isinstance(number, bool) or not isinstance(number, (int, float)):
                raise checks.fail(f"[{step}][{feature}] is {_kind(number)}, a number expected", row)
            if isinstance(number, int) and abs(number) > MAX_FLOAT32:
                raise checks.fail(f"[{step}][{feature}] is too large for float32", row)
    return value


def _width(value: object) -> int:
    assert isinstance(value, list)
    return len(value[0])


def _kind(value: object) -> str:
    """Returns JSON's name of a value's type."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    names = {dict: "an object", list: "a list", str: "a string", int: "a number", float: "a number"}
    return names[type(value)]
