"""Options and error handling of every subcommand."""

import os
import re
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
    """Connection settings from the options of a subcommand."""

    target: str
    timeout: float
    tls: bool
    ca: Path | None
    cert: Path | None
    key: Path | None
    server_name: str | None
    token_file: Path | None

    def __post_init__(self) -> None:
        if (self.cert is None) != (self.key is None):
            raise InputError("--cert, --key: one needs the other")

    @property
    def encrypts(self) -> bool:
        """True if TLS is used."""
        return self.tls or self.ca is not None or self.cert is not None

    @property
    def token(self) -> str | None:
        """Bearer token; None if there is none.

        Raises:
            InputError: its file can't be read or is empty.
        """
        if self.token_file is None:
            # Not an option: every user of the machine can read command lines.
            return os.environ.get(TOKEN_VARIABLE)
        token = _read("--token-file", self.token_file).decode("utf-8", "replace").strip()
        if not token:
            raise InputError(f"--token-file: {self.token_file}: is empty")
        return token

    def client(self, *, wait_for_ready: bool = False) -> AsyncClient:
        """Makes a client of it.

        Raises:
            InputError: a file can't be read, or an option can't be used.
        """
        certificate = None
        if self.cert and self.key:
            certificate = _read("--cert", self.cert), _read("--key", self.key)
        try:
            return AsyncClient(
                self.target,
                timeout=self.timeout,
                wait_for_ready=wait_for_ready,
                coalesce=False,
                tls=self.tls,
                root_certificates=_read("--ca", self.ca) if self.ca else None,
                certificate=certificate,
                server_name=self.server_name,
                token=self.token,
            )
        except ValueError as error:
            raise InputError(re.sub("^target:", "--server:", str(error))) from None


def _read(option: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{option}: {path}: {(error.strerror or str(error)).lower()}") from None


def server_options(function: F) -> F:
    """Adds the options of `Server` to a subcommand."""
    options = [
        click.option(
            "--server",
            "target",
            metavar="HOST:PORT,...",
            default=DEFAULT_TARGET,
            envvar="UNROLL_SERVER",
            show_default=True,
            show_envvar=True,
            help="Servers to call. A name with several addresses is balanced over all of them.",
        ),
        click.option(
            "--timeout",
            type=click.FloatRange(min=0, min_open=True),
            default=60.0,
            show_default=True,
            metavar="SECONDS",
            help="Longest wait for one call.",
        ),
        click.option("--tls", is_flag=True, help="Encrypt, and trust the system's certificate authorities."),
        click.option(
            "--ca",
            type=click.Path(path_type=Path),
            metavar="FILE",
            help="Encrypt, and trust the authorities in this PEM file.",
        ),
        click.option(
            "--cert",
            type=click.Path(path_type=Path),
            metavar="FILE",
            help="Encrypt, and authenticate by the certificate in this PEM file; needs --key.",
        ),
        click.option(
            "--key", type=click.Path(path_type=Path), metavar="FILE", help="PEM file of the certificate's private key."
        ),
        click.option("--server-name", metavar="NAME", help="Name in the server's certificate, if it is not its host."),
        click.option(
            "--token-file",
            type=click.Path(path_type=Path),
            metavar="FILE",
            help=f"File with a bearer token; by default the token comes from the environment: {TOKEN_VARIABLE}.",
        ),
    ]
    for option in reversed(options):
        function = option(function)
    return function


@contextmanager
def one_line_errors(server: Server) -> Iterator[None]:
    """Turns each expected error into one line and an exit code: 2 for bad input, 1 for all else."""
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
