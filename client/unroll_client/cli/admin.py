"""`unroll admin`: commands for operators, through a server's admin listener."""

import asyncio
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import grpc.aio

from unroll_client._channel import Connection, targets_of
from unroll_client._errors import InvalidArgument, NotFound, from_rpc_error
from unroll_client.cli.options import TOKEN_VARIABLE
from unroll_client.cli.tables import table
from unroll_proto.cli import InputError
from unroll_proto.v1 import admin_pb2 as pb
from unroll_proto.v1.admin_pb2_grpc import AdminServiceStub

DEFAULT_TARGET = "127.0.0.1:50052"

_FILE = click.Path(path_type=Path)


@click.group("admin", short_help="Loads and unloads models, lists and ends sessions.")
@click.option(
    "--server",
    metavar="HOST:PORT",
    default=DEFAULT_TARGET,
    envvar="UNROLL_ADMIN",
    show_default=True,
    show_envvar=True,
    help="The admin listener: `unroll-serve --admin`.",
)
@click.option(
    "--timeout", type=click.FloatRange(min=0, min_open=True), default=300.0, show_default=True, help="Seconds."
)
@click.option("--tls", is_flag=True, help=f"Encrypt. A bearer token is taken from the environment: {TOKEN_VARIABLE}.")
@click.option("--ca", type=_FILE, metavar="FILE", help="Encrypt, and trust the authorities in this PEM file.")
@click.option("--cert", type=_FILE, metavar="FILE", help="PEM file of the client's certificate; encrypts.")
@click.option("--key", type=_FILE, metavar="FILE", help="PEM file of the certificate's private key.")
@click.pass_context
def admin_command(
    context: click.Context, server: str, timeout: float, tls: bool, ca: Path | None, cert: Path | None, key: Path | None
) -> None:
    """Sends commands to a server's admin listener, which passes them on to all workers."""
    if (cert is None) != (key is None):
        raise InputError("--cert, --key: one needs the other")
    certificate = (_read("--cert", cert), _read("--key", key)) if cert and key else None
    authorities = _read("--ca", ca) if ca else None
    try:
        connection = Connection(
            targets_of(server),
            tls=tls,
            root_certificates=authorities,
            certificate=certificate,
            # Not an option: every user of the machine can read command lines.
            token=os.environ.get(TOKEN_VARIABLE),
        )
    except ValueError as error:
        raise InputError(str(error)) from None
    if len(connection.targets) != 1:
        raise InputError("--server: one address expected")
    context.obj = (connection, timeout)


@admin_command.command()
@click.pass_obj
def index(target: tuple[Connection, float]) -> None:
    """Lists the versions that are served, drain, load or were refused, with the reason."""
    _print_versions(_ask(target, lambda stub: stub.ListVersions, pb.ListVersionsRequest()))


@admin_command.command()
@click.pass_obj
def refresh(target: tuple[Connection, float]) -> None:
    """Looks for new and removed versions now, and lists all of them."""
    _print_versions(_ask(target, lambda stub: stub.RefreshRepository, pb.RefreshRepositoryRequest()))


@admin_command.command()
@click.argument("model")
@click.pass_obj
def load(target: tuple[Connection, float], model: str) -> None:
    """Loads the versions of MODEL from the repository."""
    _ask(target, lambda stub: stub.LoadModel, pb.LoadModelRequest(model=model))


@admin_command.command()
@click.argument("model")
@click.pass_obj
def unload(target: tuple[Connection, float], model: str) -> None:
    """Stops new work for MODEL; open sequences continue until they end."""
    _ask(target, lambda stub: stub.UnloadModel, pb.UnloadModelRequest(model=model))


@admin_command.command()
@click.option("--limit", type=click.IntRange(1, 100_000), default=1000, show_default=True, help="Sessions at most.")
@click.pass_obj
def sessions(target: tuple[Connection, float], limit: int) -> None:
    """Lists the sessions that the server keeps, the most recently used first."""
    response = _ask(target, lambda stub: stub.ListSessions, pb.ListSessionsRequest(limit=limit))
    _print_table(
        ("owner", "session", "model", "version", "step", "expires in"),
        [
            (
                each.owner or "-",
                each.session_id,
                each.model,
                str(each.version),
                str(each.step),
                f"{each.expires_in:.0f} s",
            )
            for each in response.sessions
        ],
    )


@admin_command.command("end-session")
@click.argument("session")
@click.option("--owner", default="", help="Identity of the session's owner.")
@click.pass_obj
def end_session(target: tuple[Connection, float], session: str, owner: str) -> None:
    """Ends SESSION, even while it is used."""
    _ask(target, lambda stub: stub.EndSession, pb.EndSessionRequest(owner=owner, session_id=session))


def _read(option: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{option}: {path}: {(error.strerror or '').lower()}") from None


def _ask(target: tuple[Connection, float], method: Callable[[AdminServiceStub], Any], request: Any) -> Any:
    connection, timeout = target
    try:
        return asyncio.run(_call(connection, timeout, method, request))
    except grpc.aio.AioRpcError as error:
        found = from_rpc_error(error)
    if isinstance(found, (InvalidArgument, NotFound)):
        raise InputError(found.message)
    raise click.ClickException(f"{connection.targets[0]}: {found.message}")


async def _call(connection: Connection, seconds: float, method: Callable[[AdminServiceStub], Any], request: Any) -> Any:
    (channel,) = connection.open()
    async with channel:
        return await method(AdminServiceStub(channel))(request, timeout=seconds, metadata=connection.call_metadata())


def _print_versions(response: pb.ListVersionsResponse) -> None:
    _print_table(
        ("model", "version", "state", "reason"),
        [
            (
                each.model,
                str(each.version),
                pb.VersionState.Name(each.state).removeprefix("VERSION_STATE_"),
                each.reason,
            )
            for each in response.versions
        ],
    )


def _print_table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    click.echo(table(names, rows, right=("version", "step")))
