"""Tables for terminals."""

from collections.abc import Collection, Iterable, Sequence
from unicodedata import combining, east_asian_width

import click


def table(header: Sequence[str], rows: Iterable[Sequence[str]], right: Collection[str] = ()) -> str:
    """Aligns rows of text under a header in bold.

    Args:
        header: Names of the columns.
        rows: The cells of each; `click.style` may have styled them.
        right: Names of the columns that are aligned to the right.
    """
    lines = [[click.style(name, bold=True) for name in header], *rows]
    widths = [max(map(_width, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            " " * (width - _width(cell)) + cell if name in right else cell + " " * (width - _width(cell))
            for name, cell, width in zip(header, line, widths, strict=True)
        ).rstrip()
        for line in lines
    )


def _width(text: str) -> int:
    """Returns the columns that the text takes on a terminal."""
    return sum(0 if combining(c) else 2 if east_asian_width(c) in "FW" else 1 for c in click.unstyle(text))
