"""Outputs of `unroll classify`: Parquet, JSON Lines or CSV files, or lines on the terminal."""

import csv
import io
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Final, Protocol

import click
import numpy as np
from numpy.typing import NDArray

from unroll_client._errors import UnrollError
from unroll_client._types import Classification
from unroll_client.cli.report import printable
from unroll_client.cli.termination import terminable
from unroll_proto.cli import InputError
from unroll_proto.files import replacing
from unroll_proto.sequences import ARROW_MISSING

COLUMNS: Final = ("id", "label", "probability", "probabilities", "logits")
PARQUET: Final = ".parquet"


class Output(Protocol):
    """Writer of batches, in their order."""

    def write(self, ids: Sequence[str], result: Classification) -> None:
        """Writes one batch: ids [n] and their results."""

    def finish(self) -> None:
        """Writes what is buffered."""


class JsonLinesOutput:
    """JSON Lines: an object with the keys COLUMNS for each sequence."""

    def __init__(self, file: IO[bytes]) -> None:
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

    def __init__(self, file: IO[bytes]) -> None:
        self._text = io.TextIOWrapper(file, encoding="utf-8", newline="", write_through=True)
        # Before Python 3.13 QUOTE_MINIMAL does not quote a carriage return, at which readers end the row.
        self._writer = csv.writer(self._text, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
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


_FILES: Final[dict[str, Callable[[IO[bytes]], Output]]] = {
    ".jsonl": JsonLinesOutput,
    ".ndjson": JsonLinesOutput,
    ".csv": CsvOutput,
}


def to_file(path: Path) -> AbstractContextManager[Output]:
    """Yields an output that becomes the file `path` if the context is left without an exception.

    Raises:
        InputError: its suffix is unknown, no file can be made there, or Parquet needs the extra `files`.
    """
    suffix = path.suffix.lower()
    kind = _parquet(path) if suffix == PARQUET else _FILES.get(suffix)
    if kind is None:
        raise InputError(f"{path}: a name that ends in {', '.join([PARQUET, *_FILES])} expected")
    if path.is_dir() or not path.parent.is_dir():
        raise InputError(f"{path}: {'is a folder' if path.is_dir() else f'there is no folder {path.parent}'}")
    return _opened(path, kind)


def _parquet(path: Path) -> Callable[[IO[bytes]], Output]:
    try:
        from unroll_client.cli.parquet import ParquetOutput
    except ModuleNotFoundError:
        raise InputError(f"{path}: {ARROW_MISSING}") from None
    return ParquetOutput


@contextmanager
def _opened(path: Path, kind: Callable[[IO[bytes]], Output]) -> Iterator[Output]:
    try:
        with terminable(), replacing(path) as file:
            output = kind(file)
            try:
                yield output
            except BaseException:
                # An unfinished writer would report an error on deletion, where nobody can catch it.
                with suppress(Exception):
                    output.finish()
                raise
            output.finish()
    except UnrollError:
        raise  # Some of these are also OSErrors.
    except OSError as error:
        raise click.ClickException(f"{path}: {(error.strerror or str(error)).lower()}") from None


@contextmanager
def to_terminal(as_json: bool) -> Iterator[Output]:
    """Returns an output to standard output: lines for people on a terminal, else JSON Lines."""
    output = JsonLinesOutput(sys.stdout.buffer) if as_json else TerminalOutput()
    yield output
    output.finish()


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
