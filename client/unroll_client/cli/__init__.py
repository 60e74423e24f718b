"""`unroll`: the command line of the client."""

from importlib.metadata import entry_points
from typing import NoReturn

import click

from unroll_client.cli.admin import admin_command
from unroll_client.cli.classify import classify_command
from unroll_client.cli.models import models_command
from unroll_client.cli.stream import stream_command
from unroll_proto import cli

GROUP = "unroll.commands"
"""Entry points by which other distributions add subcommands."""
_ELSEWHERE = {"web": "unroll-web"}
"""Distribution of each known subcommand that is not part of this one."""


class _Commands(click.Group):
    """The subcommands of this package, and those that installed distributions add."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*super().list_commands(ctx), *sorted(entry_points(group=GROUP).names)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        found = super().get_command(ctx, cmd_name)
        if found is None and (added := entry_points(group=GROUP, name=cmd_name)):
            (entry,) = added
            loaded: click.Command = entry.load()
            return loaded
        if found is None and cmd_name in _ELSEWHERE:
            raise cli.InputError(f"{cmd_name}: not installed: pip install {_ELSEWHERE[cmd_name]}")
        return found


@click.group(cls=_Commands, context_settings={"max_content_width": 100})
def command() -> None:
    """Calls an Unroll server: lists its models, classifies files of sequences, shows hidden states.

    \b
    Examples:
      unroll models
      unroll classify utterances.parquet --model jv -o classes.parquet
      unroll stream utterances.parquet --model jv --index 3

    Files of sequences are Parquet, JSON Lines, npz or .ts. Exit codes: 0 done, 1 the server or the work failed,
    2 the command line or the input can't be used, 130 interrupted, 143 terminated.
    """  # noqa: D301 (click's mark for a paragraph that is not wrapped)


command.add_command(models_command)
command.add_command(classify_command)
command.add_command(stream_command)
command.add_command(admin_command)


def main() -> NoReturn:
    """Entry point of `unroll`."""
    cli.run("unroll", command, "unroll-client")
