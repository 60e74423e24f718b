"""Command-line conventions shared by all commands: `-h`, `--version`, default subcommands, one-line errors."""

import errno
import io
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import click


class DefaultGroup(click.Group):
    """A group that passes words that name no subcommand to the subcommand `default`.

    So `unroll-export runs/jv --out models/jv` and `unroll-export verify models/jv/1` work side by side.
    """

    default: str

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Inserts the default subcommand's name unless the first word names a subcommand."""
        own = {name for parameter in self.get_params(ctx) for name in parameter.opts}
        if args and args[0] not in self.commands and args[0] not in own:
            args = [self.default, *args]
        return super().parse_args(ctx, args)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes the options of the default subcommand and of the group, then the subcommands."""
        shown = click.Command(None, params=[*self.commands[self.default].params, *self.params])
        shown.format_options(ctx, formatter)
        self.format_commands(ctx, formatter)


class InputError(click.ClickException):
    """Input of the user can't be used; the message is one line that names it."""

    exit_code = 2


def run(name: str, command: click.Command, distribution: str) -> NoReturn:
    """Runs `command` as the process `name` and exits.

    Adds `-h` beside `--help`, also to subcommands, and `--version`, which prints the version of `distribution`.

    Exit codes: 0 done; 1 the command raised ClickException (work failed) or OSError, as if standard output can't be
    written; 2 bad usage or input; 130 interrupted.
    """
    if sys.stdout is None:  # as after `>&-`
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115 (for as long as the process)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A name may hold characters that the terminal's encoding, or any encoding, lacks.
        sys.stdout.reconfigure(errors="backslashreplace")
    command.context_settings = {**command.context_settings, "help_option_names": ["-h", "--help"]}
    if not any("--version" in parameter.opts for parameter in command.params):
        # The environment must not trigger it: deployments use the name UNROLL_VERSION.
        message = "%(prog)s %(version)s"
        click.version_option(package_name=distribution, message=message, allow_from_autoenv=False)(command)
    try:
        code = command.main(prog_name=name, standalone_mode=False) or 0
        # A failed write at the exit of the process could not be reported.
        sys.stdout.flush()
        sys.exit(code)
    except click.exceptions.Abort:
        click.echo(f"{name}: interrupted", err=True)
        sys.exit(130)
    except click.ClickException as error:
        click.echo(f"{name}: {error.format_message()}", err=True)
        sys.exit(error.exit_code)
    except OSError as error:
        # Closed as for a broken pipe; the exit would try the write again and report its failure.
        with suppress(OSError):
            sys.stdout.close()
        if error.errno != errno.EPIPE:
            click.echo(f"{name}: {(error.strerror or str(error)).lower()}", err=True)
        sys.exit(1)
