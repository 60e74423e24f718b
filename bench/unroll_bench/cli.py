"""`unroll-bench`: measures how fast a server answers under a chosen load."""

import asyncio
import json
import ssl
from dataclasses import asdict, fields
from datetime import UTC, datetime
from typing import Any, NoReturn

import click

from unroll_bench.load import Peer
from unroll_bench.load.report import lines, summary
from unroll_bench.settings import DEFAULT_IN_FLIGHT, DEFAULT_LENGTHS, Settings
from unroll_client.cli.options import Server, one_line_errors, server_options
from unroll_proto import cli
from unroll_proto.cli import InputError

_positive = click.FloatRange(min=0, min_open=True)
_natural = click.IntRange(min=1)


@click.command(context_settings={"max_content_width": 100})
@click.option("--model", default="", metavar="NAME", help="Model to ask; not needed if only one is served.")
@click.option("--model-version", type=_natural, metavar="N", help="Model version.  [default: the newest]")
@click.option(
    "--closed", type=_natural, metavar="N", help=f"Keep N requests in flight.  [default: {DEFAULT_IN_FLIGHT}]"
)
@click.option("--open", type=_positive, metavar="RATE", help="Send RATE requests per second, at random moments.")
@click.option("--sequences", type=_natural, metavar="N", help="Stream: keep N sequences open.  [default: --streams]")
@click.option("--streams", type=_natural, metavar="N", help="Stream: number of calls.  [default: 1]")
@click.option(
    "--cadence",
    type=_positive,
    metavar="SECONDS",
    help="Stream: seconds between chunks of a sequence.  [default: when the previous one is answered]",
)
@click.option("--chunk", type=_natural, default=1, show_default=True, help="Stream: timesteps per chunk.")
@click.option("--lengths", metavar="N|N..M", help=f"Timesteps of random sequences.  [default: {DEFAULT_LENGTHS}]")
@click.option(
    "--batch", type=_natural, default=1, show_default=True, help="Sequences of a request, or of a stream's message."
)
@click.option("--connections", type=_natural, default=1, show_default=True, help="TCP connections.")
@click.option("--seconds", type=_positive, default=10.0, show_default=True, help="Seconds to measure.")
@click.option("--warm-up", type=click.FloatRange(min=0), default=1.0, show_default=True, help="Seconds of warm-up.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON with all settings.")
@server_options
def command(model: str, model_version: int | None, as_json: bool, **options: Any) -> None:
    """Drives an Unroll server and reports how fast it answers: rates, and percentiles of latency.

    Requests are Classify calls, a fixed number in flight (--closed) or at a rate (--open). With --sequences, --streams
    or --cadence, sequences are kept open on streams instead, and the answer to each chunk is timed.

    Latencies of --open and --cadence count from when a request should have been sent, even if it was late. Those of
    --closed count from the sending, so a slow answer keeps its caller from sending.

    Every answer is checked: finite numbers, the label of the largest logit, and the same bits for the same
    request. Exit code 1 if an answer is wrong or a call failed.

    \b
    Examples:
      unroll-bench --closed 64 --lengths 29
      unroll-bench --open 2000 --lengths 5..120 --seconds 30 --json > run.json
      unroll-bench --sequences 10000 --streams 10 --cadence 1
    """  # noqa: D301 (click's mark for a paragraph that is not wrapped)
    server = Server(**{field.name: options.pop(field.name) for field in fields(Server)})
    try:
        settings = Settings(**options)
    except ValueError as error:
        raise InputError(str(error)) from None
    with one_line_errors(server):
        out = asyncio.run(_measure(server, settings, model, model_version or 0))
    if as_json:
        click.echo(json.dumps(out, indent=2, ensure_ascii=False))
    else:
        click.echo("{name} version {version} ({runtime} {device}), ".format(**out["model"]) + server.target)
        for line in lines(out):
            click.echo(line)
    failed = sum(out["errors"].values())
    if failed or out["wrong"]:
        raise click.ClickException(f"{failed} errors, {out['wrong']} wrong answers")
    if not out["calls"]:
        raise click.ClickException(f"no answer within {settings.seconds:g} s")


async def _measure(server: Server, settings: Settings, name: str, version: int) -> dict[str, Any]:
    async with server.client() as client:
        model = await client.model(name, version)
    peer = _peer(server)
    started = datetime.now(UTC)
    try:
        load = settings.load(model)
        result = await load.run(peer)
    except ValueError as error:
        raise InputError(str(error)) from None
    except OSError as error:
        raise click.ClickException(f"no answer from {server.target}: {error.strerror or error}") from None
    return {
        "server": server.target,
        "model": {"name": model.name, "version": model.version, "runtime": model.runtime, "device": model.device},
        "started": started.isoformat(timespec="seconds"),
        "mode": settings.mode,
        "settings": asdict(settings),
        **summary(result, load.of_one_call),
    }


def _peer(server: Server) -> Peer:
    if "," in server.target:
        raise InputError("--server: one server expected, the one to measure")
    token = server.token
    return Peer(
        server.target,
        tls=_context(server) if server.encrypts else None,
        metadata=(("authorization", f"Bearer {token}"),) if token else (),
        timeout=server.timeout,
    )


def _context(server: Server) -> ssl.SSLContext:
    if server.server_name is not None:
        raise InputError("--server-name: not supported here")
    try:
        context = ssl.create_default_context(cafile=server.ca)
    except (OSError, ssl.SSLError) as error:
        raise InputError(f"--ca: {server.ca}: {(error.strerror or str(error)).lower()}") from None
    if server.cert is not None:
        try:
            context.load_cert_chain(server.cert, server.key)
        except (OSError, ssl.SSLError) as error:
            raise InputError(f"--cert: {server.cert}: {(error.strerror or str(error)).lower()}") from None
    context.set_alpn_protocols(["h2"])
    return context


def main() -> NoReturn:
    """Runs `unroll-bench`."""
    cli.run("unroll-bench", command, "unroll-bench")
