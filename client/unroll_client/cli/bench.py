"""`unroll bench`: how fast a server answers, under a load of the user's making."""

import asyncio
import json
import ssl
from collections.abc import Awaitable
from dataclasses import fields
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.live import Live

from unroll_client.cli.bench_settings import DEFAULT_IN_FLIGHT, DEFAULT_LENGTHS, Settings
from unroll_client.cli.options import Server, one_line_errors, server_options
from unroll_proto.cli import InputError
from unroll_proto.files import replacing
from unroll_proto.sequences import SequenceError

if TYPE_CHECKING:
    from unroll_client.load import Peer, Result, Tally

_REFRESH = 0.5

positive = click.FloatRange(min=0, min_open=True)
natural = click.IntRange(min=1)


@click.command("bench", short_help="Measures how fast a server answers.")
@click.option("--model", default="", metavar="NAME", help="Model to ask; needless where only one is served.")
@click.option("--model-version", type=natural, metavar="N", help="Its version.  [default: the newest]")
@click.option("--closed", type=natural, metavar="N", help=f"Keep N requests in flight.  [default: {DEFAULT_IN_FLIGHT}]")
@click.option("--open", type=positive, metavar="RATE", help="Send RATE requests a second, at random moments.")
@click.option("--sequences", type=natural, metavar="N", help="Stream: keep N sequences open.  [default: --streams]")
@click.option("--streams", type=natural, metavar="N", help="Stream: on N calls.  [default: 1]")
@click.option(
    "--cadence",
    type=positive,
    metavar="SECONDS",
    help="Stream: a chunk of each sequence so often.  [default: when the one before is answered]",
)
@click.option("--chunk", type=natural, default=1, show_default=True, help="Stream: timesteps of a chunk.")
@click.option("--every", type=natural, default=1, show_default=True, help="Stream: report every n-th step only.")
@click.option(
    "--lengths",
    metavar="N|N..M|normal:MEAN,SD",
    help=f"Timesteps of random sequences.  [default: {DEFAULT_LENGTHS}]",
)
@click.option("--file", type=click.Path(path_type=Path), help="Send this file's sequences (as `unroll classify`).")
@click.option("--batch", type=natural, default=1, show_default=True, help="Sequences of a request.")
@click.option("--connections", type=natural, default=1, show_default=True, help="TCP connections.")
@click.option("--seconds", type=positive, default=10.0, show_default=True, help="How long to measure.")
@click.option("--warm-up", type=click.FloatRange(min=0), default=1.0, show_default=True, help="Seconds before that.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of all that is random.")
@click.option(
    "--json",
    "json_file",
    type=click.Path(path_type=Path, allow_dash=True),
    metavar="FILE",
    help='Write JSON; "-": print.',
)
@server_options
def bench_command(json_file: Path | None, **options: Any) -> None:
    """Drives a server and says how fast it answers: rates, and percentiles of latency.

    Requests are Classify calls, a number in flight (--closed) or at a rate (--open). With --sequences, --streams or
    --cadence, sequences are kept open on streams instead, and each chunk's answer is waited for.

    Latencies of --open and --cadence count from when a request should have left, however late it did. Those of
    --closed are given as they are, and corrected for the requests that a slow answer kept from being sent.

    Every answer is checked: numbers finite, the label that of the largest logit, and the same bits whenever the same
    is asked. Exit code 1 where any answer is wrong or any call failed.

    \b
    Examples:
      unroll bench --closed 64 --lengths 29
      unroll bench --open 2000 --lengths normal:60,20 --seconds 30 --json run.json
      unroll bench --sequences 10000 --streams 10 --cadence 1
    """  # noqa: D301 (click's mark for a paragraph that is not wrapped)
    server = Server(**{field.name: options.pop(field.name) for field in fields(Server)})
    try:
        settings = Settings(**options)
    except ValueError as error:
        raise InputError(str(error)) from None
    if json_file and json_file != Path("-") and (json_file.is_dir() or not json_file.parent.is_dir()):
        # Before the run, which would be for nothing.
        problem = "is a folder" if json_file.is_dir() else f"there is no folder {json_file.parent}"
        raise InputError(f"--json: {json_file}: {problem}")
    console = Console(stderr=json_file == Path("-"), highlight=False)
    with one_line_errors(server):
        out = asyncio.run(_bench(server, settings, console))
    text = json.dumps(out, indent=2, ensure_ascii=False) + "\n"
    if json_file == Path("-"):
        click.echo(text, nl=False)
    elif json_file:
        try:
            with replacing(json_file) as file:
                file.write(text.encode())
        except OSError as error:
            raise InputError(f"--json: {json_file}: {(error.strerror or '').lower()}") from None
    failed = sum(out["errors"].values())
    if failed or out["wrong"]:
        raise click.ClickException(f"{failed} errors, {out['wrong']} wrong answers")
    if not out["calls"]:
        raise click.ClickException(f"no answer within {settings.seconds:g} s")


async def _bench(server: Server, settings: Settings, console: Console) -> dict[str, Any]:
    from unroll_client.cli.bench_work import prepare
    from unroll_client.load import Tally
    from unroll_client.load.report import summary, table

    async with server.client() as client:
        model = await client.model(settings.model, settings.model_version or 0)
    tally = Tally()
    peer = _peer(server)
    started = datetime.now(UTC)
    try:
        work = prepare(settings, model)
        result = await _watched(work.run(peer, tally), tally, settings.seconds, console)
    except SequenceError:
        raise
    except ValueError as error:
        raise InputError(str(error)) from None
    except OSError as error:
        raise click.ClickException(f"no answer from {server.target}: {error.strerror or error}") from None
    # A caller that calls again when it is answered would do so every typical latency, were none of them slow.
    interval = None if settings.scheduled else result.percentile(50)
    out = {
        "server": server.target,
        "model": {"name": model.name, "version": model.version, "runtime": model.runtime, "device": model.device},
        "started": started.isoformat(timespec="seconds"),
        "mode": settings.mode,
        "settings": settings.plain(),
        **summary(result, work.of_one_call, interval),
    }
    console.print(table(f"{model.name} version {model.version} on {server.target}", out))
    return out


def _peer(server: Server) -> "Peer":
    from unroll_client.load import Peer

    if "," in server.target:
        raise InputError("--server: one server expected, since it is what is measured")
    token = server.token
    return Peer(
        server.target,
        tls=_context(server) if server.encrypts else None,
        metadata=(("authorization", f"Bearer {token}"),) if token else (),
        timeout=server.timeout,
    )


def _context(server: Server) -> ssl.SSLContext:
    if server.server_name is not None:
        raise InputError("--server-name: can't be given here")
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


async def _watched(run: "Awaitable[Result]", tally: "Tally", seconds: float, console: Console) -> "Result":
    """Shows how the run goes, where somebody is looking."""
    from unroll_client.load.report import LiveLine

    if not console.is_terminal:
        return await run
    line = LiveLine(tally, seconds)
    task = asyncio.ensure_future(run)
    try:
        # Painted by us, between calls: a thread that paints would hold the run up at any moment.
        with Live(line.text(perf_counter()), console=console, auto_refresh=False, transient=True) as live:
            while not (await asyncio.wait([task], timeout=_REFRESH))[0]:
                live.update(line.text(perf_counter()), refresh=True)
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    return task.result()
