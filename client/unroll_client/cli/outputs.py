"""Outputs of `unroll classify`: Parquet, JSON Lines or CSV files, or lines on the terminal."""

import csv
import io
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import IO, Any, Final, Protocol

import click
import numpy as np
from numpy.typing import NDArray

from unroll_client._errors import UnrollError
from unroll_client._types import Classification
from unroll_client.cli.locations import Location, replacing
from unroll_client.cli.report import printable
from unroll_proto.cli import InputError
from unroll_proto.sequences import ARROW_MISSING

COLUMNS: Final = ("id", "label", "probability", "probabilities", "logits")
PARQUET: Final = ".parquet"
GROUP_ROWS = 1 << 16
"""Rows of a part and of a row group: large enough to compress well, small enough for memory."""


class Output(Protocol):
    """Writer of batches, in their order."""

    def write(self, ids: Sequence[str], result: Classification) -> None:
        """Writes one batch: ids [n] and their results."""

    def finish(self) -> None:
        """Writes what is buffered."""


Kind = Callable[[IO[bytes], bool], Output]
"""Makes the writer of a file: with a header, where the format has one, or the rest of such a file."""


class JsonLinesOutput:
    """JSON Lines: an object with the keys COLUMNS for each sequence."""

    def __init__(self, file: IO[bytes], header: bool = True) -> None:
        self._file = file

    def write(self, ids: Sequence[str], result: Classification) -> None:
        """Writes a line for each sequence."""
        lines = [to_json(dict(zip(COLUMNS, row, strict=True))) + "\n" for row in _rows(ids, result)]
        self._file.write("".join(lines).encode())

    def finish(self) -> None:
        """Flushes."""
        self._file.flush()


class CsvOutput:
    """CSV with a header; strings are quoted, lists are JSON arrays."""

    def __init__(self, file: IO[bytes], header: bool = True) -> None:
        self._text = io.TextIOWrapper(file, encoding="utf-8", newline="", write_through=True)
        # Before Python 3.13 QUOTE_MINIMAL does not quote a carriage return, at which readers end the row.
        self._writer = csv.writer(self._text, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
        if header:
            self._writer.writerow(COLUMNS)

    def write(self, ids: Sequence[str], result: Classification) -> None:
        """Writes a line for each sequence."""
        self._writer.writerows(
            (name, label, probability, to_json(probabilities), to_json(logits))
            for name, label, probability, probabilities, logits in _rows(ids, result)
        )

    def finish(self) -> None:
        """Flushes; the caller closes the file."""
        self._text.flush()
        self._text.detach()


class TerminalOutput:
    """Lines for people: id, label and probability of each sequence."""

    def __init__(self) -> None:
        click.echo(f"{'id':<20} {'label':<20} probability")

    def write(self, ids: Sequence[str], result: Classification) -> None:
        """Prints."""
        names, labels = map(printable, ids), map(printable, result.labels)
        rows = zip(names, labels, top_probabilities(result).tolist(), strict=True)
        click.echo("\n".join(f"{name:<20} {label:<20} {probability:.4f}" for name, label, probability in rows))

    def finish(self) -> None:
        """Does nothing."""


_FILES: Final[dict[str, Kind]] = {
    ".jsonl": JsonLinesOutput,
    ".ndjson": JsonLinesOutput,
    ".csv": CsvOutput,
}


def kind_of(path: Location) -> Kind:
    """Returns the writer of a file, by its suffix; of a folder's parts without one.

    Raises:
        InputError: its suffix is unknown, or Parquet needs the extra `files`.
    """
    suffix = path.suffix.lower() or PARQUET
    if suffix == PARQUET:
        try:
            from unroll_client.cli.parquet import ParquetOutput
        except ModuleNotFoundError:
            raise InputError(f"{path}: {ARROW_MISSING.format('Parquet')}") from None
        return ParquetOutput
    if suffix not in _FILES:
        raise InputError(f"{path}: a name that ends in {', '.join([PARQUET, *_FILES])} expected, or a folder")
    return _FILES[suffix]


@contextmanager
def writing(path: Location, kind: Kind, *, header: bool = True) -> Iterator[Output]:
    """Yields an output that becomes the file `path` if the context is left without an exception."""
    with file_errors(path), replacing(path) as file:
        output = kind(file, header)
        try:
            yield output
        except BaseException:
            # An unfinished writer would report an error on deletion, where nobody can catch it.
            with suppress(Exception):
                output.finish()
            raise
        output.finish()


@contextmanager
def file_errors(path: Location) -> Iterator[None]:
    """Turns errors of the operating system into one line that names the file."""
    try:
        yield
    except UnrollError:
        raise  # Some of these are also OSErrors.
    except OSError as error:
        raise click.ClickException(f"{path}: {(error.strerror or str(error)).lower()}") from None


def to_terminal(as_json: bool) -> Output:
    """Returns an output to standard output: lines for people on a terminal, else JSON Lines."""
    return JsonLinesOutput(sys.stdout.buffer) if as_json else TerminalOutput()


def top_probabilities(result: Classification) -> NDArray[np.float32]:
    """Returns the probability of each sequence's label, float32 [n]."""
    return np.take_along_axis(result.probabilities, result.label_indices[:, np.newaxis], axis=1)[:, 0]


def to_json(value: Any) -> str:
    """Returns JSON on one line. NaN and infinities, which JSON lacks, become null."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(value), ensure_ascii=False, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _rows(ids: Sequence[str], result: Classification) -> Iterator[tuple[str, str, float, list[float], list[float]]]:
    return zip(
        ids,
        result.labels,
        top_probabilities(result).tolist(),
        result.probabilities.tolist(),
        result.logits.tolist(),
        strict=True,
    )
