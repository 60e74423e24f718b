"""Options of commands that read sequence files: names of the columns."""

from collections.abc import Callable
from typing import Any, TypeVar

import click

from unroll_proto.sequences.types import Columns

F = TypeVar("F", bound=Callable[..., Any])


def _names(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[str, ...]:
    return tuple(name.strip() for name in value.split(",")) if value else ()


def column_options(function: F) -> F:
    """Adds the options of `Columns` to a command, which takes them as `columns_of` expects."""
    options = [
        click.option("--sequence-column", metavar="NAME", help="Column of whole sequences.  [default: sequence]"),
        click.option("--id", "id_column", metavar="NAME", help="Column of the ids.  [default: id]"),
        click.option(
            "--time",
            "time_column",
            metavar="NAME",
            help="Column of the time, in tables with a row for each timestep.  [default: time]",
        ),
        click.option(
            "--features",
            metavar="NAME,...",
            callback=_names,
            help="Columns of the features, in their order.  [default: those of the model, or all others]",
        ),
        click.option("--label", "label_column", metavar="NAME", help="Column of the true classes.  [default: label]"),
    ]
    for option in reversed(options):
        function = option(function)
    return function


def columns_of(options: dict[str, Any]) -> Columns:
    """Takes the options of `column_options` out of a command's."""
    names = ("sequence_column", "id_column", "time_column", "features", "label_column")
    return Columns(*(options.pop(name) for name in names))
