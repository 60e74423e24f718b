"""What every subcommand shares: how to reach the server, and one line for whatever goes wrong."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import click

from unroll_client._async_client import DEFAULT_TARGET, AsyncClient
from unroll_client._errors import InvalidArgument, NotFound, Unavailable, UnrollError
from unroll_proto.cli import InputError
from unroll_proto.sequences import SequenceError

F = TypeVar("F", bound=Callable[..., Any])

TOKEN_VARIABLE = "UNROLL_TOKEN"  # noqa: S105 (the variable's name)


@dataclass(frozen=True, slots=True)
class Server:
    """How to reach the server, from the options of a subcommand."""

    target: str
    timeout: float
    tls: bool
    ca: Path | None

    def client(self, *, wait_for_ready: bool = False) -> AsyncClient:
        """A client for it.

        Raises:
            InputError: the file of `--ca` can't be read.
        """
        try:
            authorities = self.ca.read_bytes() if self.ca else None
        except OSError as error:
            raise InputError(f"--ca: {self.ca}: {(error.strerror or '').lower()}") from None
        return AsyncClient(
            self.target,
            timeout=self.timeout,
            wait_for_ready=wait_for_ready,
            tls=self.tls,
            root_certificates=authorities,
            # Not an option, since command lines can be read by everyone on the machine.
            token=os.environ.get(TOKEN_VARIABLE),
        )


def server_options(function: F) -> F:
    """Adds the options that `Server` is made of."""
    options = [
        click.option(
            "--server",
            "target",
            metavar="HOST:PORT",
            default=DEFAULT_TARGET,
            envvar="UNROLL_SERVER",
            show_default=True,
            show_envvar=True,
            help="Server to call; a name with several addresses is balanced over all of them.",
        ),
        click.option(
            "--timeout",
            type=click.FloatRange(min=0, min_open=True),
            default=60.0,
            show_default=True,
            metavar="SECONDS",
            help="Longest wait for one call.",
        ),
        click.option(
            "--tls", is_flag=True, help=f"Encrypt. A bearer token is taken from the environment: {TOKEN_VARIABLE}."
        ),
        click.option(
            "--ca",
            type=click.Path(path_type=Path),
            metavar="FILE",
            help="Encrypt, and trust the authorities in this PEM file.",
        ),
    ]
    for option in reversed(options):
        function = option(function)
    return function


@contextmanager
def one_line_errors(server: Server) -> Iterator[None]:
    """Makes of each expected error one line and an exit code: 2 for what the user gave, 1 for all else."""
    try:
        yield
    except SequenceError as error:
        raise InputError(str(error)) from None
    except (InvalidArgument, NotFound) as error:
        raise InputError(error.message) from None
    except Unavailable as error:
        raise click.ClickException(f"no answer from {server.target}: {error.message}") from None
    except UnrollError as error:
        raise click.ClickException(f"{server.target}: {error.message}") from None
