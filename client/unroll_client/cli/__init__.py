"""`unroll`: the command line of the client."""

from typing import NoReturn

import click

from unroll_client.cli.admin import admin_command
from unroll_client.cli.classify import classify_command
from unroll_client.cli.models import models_command
from unroll_client.cli.stream import stream_command
from unroll_proto import cli


@click.group(context_settings={"max_content_width": 100})
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
