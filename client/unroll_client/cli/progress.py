"""Progress of a long run on standard error: a bar on a terminal, else a line now and then."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from typing import Protocol

import click

SECONDS = 10.0
"""Time between two lines."""


class Progress(Protocol):
    """Shows how far a run is."""

    def __call__(self, rows: int, refused: int) -> None:
        """Takes the rows that are done, all together."""


@contextmanager
def progress(total: int | None, done: int, hidden: bool) -> Iterator[Progress]:
    """Yields a function that shows progress.

    Args:
        total: Rows of the whole run; None if unknown.
        done: Rows that an earlier run did.
        hidden: True to show nothing.
    """
    if hidden or not sys.stderr.isatty():
        yield (lambda rows, refused: None) if hidden else _Lines(total, done)
        return
    shown = done
    # Without a length, only the count is shown.
    with click.progressbar(count(), length=total, label="sequences", show_pos=True, file=sys.stderr) as bar:
        bar.update(done)

        def show(rows: int, refused: int) -> None:
            nonlocal shown
            bar.update(rows - shown)
            shown = rows

        yield show


class _Lines:
    def __init__(self, total: int | None, done: int) -> None:
        self._total, self._done = total, done
        self._begin = self._last = time.monotonic()

    def __call__(self, rows: int, refused: int) -> None:
        now = time.monotonic()
        if now - self._last < SECONDS:
            return
        self._last = now
        speed = (rows - self._done) / (now - self._begin)
        text = f"{rows}{f' of {self._total}' if self._total is not None else ''} sequences, {speed:.0f}/s"
        if refused:
            text += f", {refused} refused"
        if self._total is not None and speed:
            text += f", {(self._total - rows) / speed:.0f} s left"
        click.echo(text, err=True)
