"""The command `unroll-serve`; its flags are the settings of `config`."""

from typing import Any

import click
from click.core import ParameterSource

from unroll_proto import cli
from unroll_server.config import Settings, Tuning
from unroll_server.errors import SessionsLostError, StartupError, UndrainedError
from unroll_server.process import allow_descriptors, configure_logging, run, serving_event_loop
from unroll_server.sources import Sources, flag, schema, suggestion

_SECTIONS = {
    "Models": ("models", "models_cache", "versions", "models_poll", "runtime", "device"),
    "Serving": (
        "listen",
        "transport",
        "workers",
        "threads",
        "max_concurrent_calls",
        "max_message_bytes",
        "drain_timeout",
    ),
    "Security": ("tls_cert", "tls_key", "tls_client_ca", "tokens"),
    "Sessions": ("sessions", "session_ttl", "sessions_file"),
    "Operation": ("config", "admin", "metrics", "log_level", "log_format", "access_log"),
}
"""Settings by the heading of their flags in `--help`."""
_COLUMN = 30
"""Width of the column left of the descriptions."""


class _Command(click.Command):
    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Suggests the nearest setting for an unknown flag."""
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            name = error.option_name.lstrip("-").replace("-", "_")
            raise cli.InputError(f"{error.option_name}: unknown{suggestion(name, flag)}") from None

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes the flags under their headings, and the settings without a flag."""
        rows = {option.name: option.get_help_record(ctx) or ("", "") for option in self.get_params(ctx)}
        sections = {heading: [rows.pop(name) for name in names] for heading, names in _SECTIONS.items()}
        sections["In [tuning] of the file, or UNROLL_TUNING_NAME"] = [
            (f"{name} {_metavar(kind)}", f"{kind['description']}  [default: {_default(kind)}]")
            for name, kind in ((name, schema(f"tuning.{name}")) for name in Tuning.model_fields)
        ]
        sections["Other"] = list(rows.values())
        for heading, found in sections.items():
            with formatter.section(heading):
                formatter.write_dl([(left.ljust(_COLUMN), right) for left, right in found], col_max=_COLUMN)


def _metavar(kind: dict[str, Any]) -> str:
    types = {"integer": "N", "number": "SECONDS", "string": "FILE" if kind.get("format") == "path" else "TEXT"}
    return "|".join(kind.get("enum", ())) or types[kind["type"]]


def _default(kind: dict[str, Any]) -> str | None:
    default = kind.get("default")
    return default if default is None or isinstance(default, str) else f"{default:.10g}"


def _option(name: str) -> click.Option:
    field, kind = Settings.model_fields[name], schema(name)
    description = f"{field.description}  [required]" if field.is_required() else field.description
    if kind["type"] == "boolean":
        return click.Option([f"{flag(name)}/--no-{flag(name)[2:]}"], help=description)
    # Values stay text: `Settings` checks them, like those of variables.
    return click.Option(
        [flag(name)],
        type=str,
        metavar=field.title or _metavar(kind),
        default=_default(kind),
        show_default=True,
        help=description,
    )


@click.command(
    cls=_Command,
    params=[_option(name) for names in _SECTIONS.values() for name in names],
    context_settings={"max_content_width": 100},
)
@click.pass_context
def command(context: click.Context, /, **options: Any) -> None:
    """Serves the models of a repository over gRPC, until SIGTERM or SIGINT drains it.

    Each option can also be set in the environment, as UNROLL_OPTION_NAME, or in the TOML file of --config, as
    option_name. A flag takes precedence over the environment, and the environment over the file.
    """
    try:
        flags = {
            name: value
            for name, value in options.items()
            if context.get_parameter_source(name) is ParameterSource.COMMANDLINE
        }
        sources = Sources.read(flags)
        with sources.named_in_errors():
            settings = sources.settings()
            configure_logging(settings.log_level, settings.log_format)
            allow_descriptors(settings.tuning.max_connections)
            # A supervisor imports neither models nor gRPC.
            if settings.workers == 1:
                from unroll_server.app import serve

                run(serve(settings, click.echo), serving_event_loop)
            else:
                from unroll_server.workers.supervisor import serve

                run(serve(settings, click.echo))
    except StartupError as error:
        # A key of the file can hold line breaks.
        raise cli.InputError(" ".join(str(error).splitlines())) from None
    except (SessionsLostError, UndrainedError) as error:
        raise click.ClickException(str(error)) from None
