"""The options of `unroll-serve`."""

import math
from functools import partial
from pathlib import Path
from typing import Any

import click

from unroll_proto import cli
from unroll_server.config import Settings
from unroll_server.errors import SessionsLostError, StartupError, UndrainedError
from unroll_server.process import allow_descriptors, configure_logging, run

_MOST = 2**31 - 2
"""Largest value of a count: grpcio ends the process at one connection more."""
_POSITIVE = click.IntRange(1, _MOST)
_QUEUED = click.IntRange(1, 2**62)
_FILE = click.Path(path_type=Path)


class _Seconds(click.FloatRange):
    """Seconds, thirty years at most: grpcio takes no larger number, and no NaN."""

    def __init__(self, **bounds: Any) -> None:
        super().__init__(max=1e9, **bounds)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """See click.ParamType."""
        seconds = float(super().convert(value, param, ctx))
        if math.isnan(seconds):
            self.fail(f"{value!r} is no number.", param, ctx)
        return seconds


_option = partial(click.option, show_envvar=True)


@click.command(context_settings={"auto_envvar_prefix": "UNROLL", "show_default": True, "max_content_width": 100})
@_option("--models", type=click.Path(path_type=Path), required=True, help="Folder of NAME/VERSION/ bundles.")
@_option("--listen", default="127.0.0.1:50051", help="HOST:PORT or unix:/PATH; port 0 picks a free one.")
@_option(
    "--runtime",
    type=click.Choice(["auto", "kernel", "onnx", "torchscript"]),
    default="auto",
    help="What runs the models; auto: the step kernel where it can, else onnx.",
)
@_option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", help="Where they run.")
@_option("--max-lanes", type=_POSITIVE, default=64, help="Sequences of a class, streams or bulk, in one tick.")
@_option("--tick-steps", type=_POSITIVE, default=32, help="Timesteps in a tick of all lanes, at most.")
@_option("--max-sequences", type=_POSITIVE, default=4096, help="Sequences in one Classify call.")
@_option("--max-steps", type=_POSITIVE, default=65536, help="Timesteps of one sequence, or of one chunk.")
@_option("--max-open-sequences", type=_POSITIVE, default=10000, help="Sequences open on one Unroll stream.")
@_option("--max-message-bytes", type=click.IntRange(1024, 2**31 - 1), default=16 * 2**20, help="Bytes of one request.")
@_option("--max-queued-steps", type=_QUEUED, default=4_000_000, help="Timesteps accepted and not yet answered.")
@_option(
    "--drain-timeout",
    type=_Seconds(min=0),
    default=30.0,
    help="Seconds that calls in flight have to end after SIGTERM.",
)
@_option("--workers", type=_POSITIVE, default=1, help="Serving processes that share the port.")
@_option("--metrics", metavar="HOST:PORT", help="Where Prometheus gets metrics over HTTP; nowhere if absent.")
@_option("--versions", default="all", help="Versions of a model to serve: all, latest, or latest:N.")
@_option(
    "--models-poll",
    type=_Seconds(min=0),
    default=5.0,
    help="Seconds between looks for new and removed versions; 0: none, only when the admin listener is told to.",
)
@_option(
    "--admin",
    metavar="ADDRESS",
    help="Where operators load models and list sessions, HOST:PORT or unix:/PATH; nowhere if absent.",
)
@_option("--sessions", default="memory", help="Where sessions are kept: memory, or redis://HOST:PORT/DB.")
@_option("--session-ttl", type=_Seconds(min=0, min_open=True), default=3600.0, help="Seconds a session may rest.")
@_option("--max-sessions", type=_POSITIVE, default=100_000, help="Sessions kept in memory; the longest unused goes.")
@_option("--sessions-file", type=_FILE, help="Keeps the sessions of the memory from one start to the next.")
@_option("--max-queued-bytes", type=_QUEUED, default=2**29, help="Bytes of values accepted and not yet answered.")
@_option("--max-connections", type=_POSITIVE, default=10_000, help="Connections of a process.")
@_option("--max-concurrent-calls", type=_POSITIVE, default=1000, help="Calls in flight on one connection.")
@_option("--max-connection-age", type=_Seconds(min=0), default=0.0, help="Seconds; 0: any age.")
@_option("--keepalive", type=_Seconds(min=1), default=60.0, help="Seconds of silence until a client is pinged.")
@_option("--tls-cert", type=_FILE, help="Certificate chain, PEM; read again when it changes. TLS only with it.")
@_option("--tls-key", type=_FILE, help="Its private key, PEM.")
@_option("--tls-client-ca", type=_FILE, help="Certificates, PEM, that a client's must descend from: mutual TLS.")
@_option(
    "--tokens", type=_FILE, help="File of bearer tokens, hashed, and their identities; read again when it changes."
)
@_option("--log-format", type=click.Choice(["text", "json"]), default="text", help="How log lines are written.")
@_option("--access-log/--no-access-log", default=False, help="A log line for each call.")
@_option("--log-level", type=click.Choice(["debug", "info", "warning", "error"]), default="info", help="Least to log.")
def command(**options: Any) -> None:
    """Serves the models of a repository over gRPC, until SIGTERM or SIGINT drains it.

    Every option can be given in the environment as UNROLL_OPTION_NAME.
    """
    try:
        settings = Settings(**options)
        configure_logging(settings.log_level, settings.log_format)
        allow_descriptors(settings.max_connections)
        # A parent of workers imports neither models nor gRPC.
        if settings.workers == 1:
            from unroll_server.app import serve
        else:
            from unroll_server.workers.supervisor import serve
        run(serve(settings, click.echo))
    except StartupError as error:
        raise cli.InputError(str(error)) from None
    except (SessionsLostError, UndrainedError) as error:
        raise click.ClickException(str(error)) from None
