"""`unroll models`: lists what a server serves."""

import asyncio
import dataclasses
import json

import click

from unroll_client._types import ModelInfo
from unroll_client.cli.options import Server, one_line_errors, server_options
from unroll_client.cli.tables import table


@click.command("models", short_help="Lists the models of a server.")
@server_options
@click.option("--json", "as_json", is_flag=True, help="Print JSON with all metadata.")
def models_command(as_json: bool, **options: object) -> None:
    """Lists every model version that the server serves."""
    server = Server(**options)  # type: ignore[arg-type] # click has checked the types
    with one_line_errors(server):
        models = asyncio.run(_models(server))
    if as_json:
        click.echo(json.dumps([dataclasses.asdict(model) for model in models], indent=2, ensure_ascii=False))
    else:
        click.echo(_table(models))


async def _models(server: Server) -> list[ModelInfo]:
    async with server.client() as client:
        return await client.models()


def _table(models: list[ModelInfo]) -> str:
    rows = [
        (
            model.name,
            str(model.version),
            model.architecture + (f" x{model.num_layers}" if model.num_layers > 1 else ""),
            " > ".join(str(size) for size in (model.input_size, model.hidden_size, model.output_size) if size),
            f"{model.runtime} {model.device}",
            f"{model.max_abs_diff:.1e}",
            "-" if model.test_accuracy is None else f"{model.test_accuracy:.4f}",
        )
        for model in models
    ]
    names = ("model", "version", "network", "sizes", "runtime", "max diff", "accuracy")
    return table(names, rows, right=("version", "max diff", "accuracy"))
