"""`unroll web`: serves HTTP for Unroll servers."""

import ipaddress
import logging
from functools import partial
from pathlib import Path

import click

from unroll_client.cli.options import Server, one_line_errors, server_options
from unroll_proto.cli import InputError
from unroll_web.app import create_app
from unroll_web.serving import Listener, serve
from unroll_web.settings import MAX_BODY_BYTES, Settings

_LOOPBACK = ("localhost", "127.0.0.1", "::1")


@click.command("web", short_help="Serves the page and the REST API.")
@server_options
@click.option(
    "--listen",
    metavar="HOST:PORT",
    default="127.0.0.1:8080",
    envvar="UNROLL_WEB_LISTEN",
    show_default=True,
    show_envvar=True,
    help="Address to serve on; port 0 picks a free one.",
)
@click.option(
    "--models",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    metavar="DIR",
    envvar="UNROLL_MODELS",
    show_envvar=True,
    help="Folder of the served bundles: the page reads weights there.",
)
@click.option(
    "--metrics",
    metavar="HOST:PORT",
    default="",
    envvar="UNROLL_WEB_METRICS",
    show_envvar=True,
    help="Metrics of the server (unroll-serve --metrics), which the page shows.",
)
@click.option(
    "--data",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    multiple=True,
    metavar="FILE",
    help="Sequence file that the page offers, in any format of `unroll classify`; several can be given.",
)
@click.option("--tls-cert", type=click.Path(path_type=Path), metavar="FILE", help="Serve HTTPS with this certificate.")
@click.option("--tls-key", type=click.Path(path_type=Path), metavar="FILE", help="PEM file of its private key.")
@click.option(
    "--host",
    "hosts",
    multiple=True,
    metavar="NAME",
    help="Name by which callers may address this process, besides localhost; several can be given.  "
    "[default: any, if it does not listen on loopback]",
)
@click.option(
    "--origin",
    "origins",
    multiple=True,
    metavar="ORIGIN",
    help="Origin of another site whose pages may call, such as https://lab.example; several can be given.",
)
@click.option(
    "--max-body-bytes",
    type=click.IntRange(min=1024),
    default=MAX_BODY_BYTES,
    show_default=True,
    metavar="BYTES",
    help="Most bytes of one request.",
)
@click.option(
    "--drain-timeout",
    type=click.IntRange(min=0),
    default=30,
    show_default=True,
    metavar="SECONDS",
    help="Time that requests in flight have to end after SIGTERM.",
)
@click.option(
    "--log-level",
    type=click.Choice(["debug", "info", "warning", "error"]),
    default="info",
    show_default=True,
    help="Lowest level to log; info logs every request.",
)
def web_command(
    listen: str,
    models: Path | None,
    metrics: str,
    data: tuple[Path, ...],
    tls_cert: Path | None,
    tls_key: Path | None,
    hosts: tuple[str, ...],
    origins: tuple[str, ...],
    max_body_bytes: int,
    drain_timeout: int,
    log_level: str,
    **options: object,
) -> None:
    """Serves the page and the REST API, as a client of Unroll servers.

    A caller's bearer token goes through to the servers. If this command has a token (--token-file, UNROLL_TOKEN), it is
    sent for callers without one: whoever reaches the address then calls in its name.
    """
    if (tls_cert is None) != (tls_key is None):
        raise InputError("--tls-cert, --tls-key: one needs the other")
    for origin in origins:
        if not origin.startswith(("http://", "https://")) or origin.count("/") != 2:
            raise InputError(f"--origin: https://HOST[:PORT] expected, got {origin!r}")
    server = Server(**options)  # type: ignore[arg-type] # click has checked the types
    logging.basicConfig(level=log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("uvicorn").setLevel("WARNING" if log_level == "info" else log_level.upper())
    listener = Listener(listen, tls_cert, tls_key)
    settings = Settings(
        connect=partial(server.client, wait_for_ready=False),
        target=server.target,
        models=models,
        metrics=metrics,
        data=data,
        hosts=_hosts(listener.host, hosts),
        origins=frozenset(origins),
        max_body_bytes=max_body_bytes,
    )
    with one_line_errors(server):
        serve(create_app(settings), listener, server.target, drain_timeout)


def _hosts(listening: str, given: tuple[str, ...]) -> frozenset[str]:
    """Returns the names by which callers may address the process; none for any.

    On loopback, pages of other sites could otherwise call by a name of their own (DNS rebinding).
    """
    if not given and not _is_loopback(listening):
        return frozenset()
    return frozenset(map(str.lower, (*_LOOPBACK, listening, *given)))


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
