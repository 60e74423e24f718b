"""`unroll classify`: the class of every sequence of a file."""

import asyncio
import sys
from contextlib import AbstractAsyncContextManager, aclosing
from itertools import count
from pathlib import Path
from shutil import get_terminal_size

import click
from click.core import ParameterSource

from unroll_client.cli.backends import Backend, serving
from unroll_client.cli.options import Server, one_line_errors, server_options
from unroll_client.cli.outputs import Output, to_file, to_terminal
from unroll_client.cli.pipeline import classified
from unroll_client.cli.report import Score, printable
from unroll_proto.cli import InputError
from unroll_proto.sequences import count_sequences, read_blocks


@click.command("classify", short_help="Classifies every sequence of a file.")
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--bundle",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="Compute in this process with the model of this folder, such as models/jv, instead of asking a server.",
)
@click.option("--model", default="", metavar="NAME", help="Model to ask; not needed if only one is served.")
@click.option("--model-version", type=click.IntRange(min=1), metavar="N", help="Model version.  [default: the newest]")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Write a .parquet, .jsonl or .csv file, which appears when complete.  [default: standard output]",
)
@server_options
def classify_command(
    file: Path,
    bundle: Path | None,
    model: str,
    model_version: int | None,
    output: Path | None,
    **options: object,
) -> None:
    """Classifies every sequence of FILE (Parquet, JSON Lines, npz or .ts).

    The output has the columns id, label, probability (of that label), probabilities and logits (lists). Where FILE
    has labels, accuracy and confusion matrix follow. Without -o, lines for people go to a terminal, and JSON Lines
    to anything else. Memory doesn't grow with FILE, except for npz.
    """
    server = Server(**options)  # type: ignore[arg-type] # click has checked the types
    if bundle:
        _check_alone(click.get_current_context())
    backend = _bundle_backend(bundle) if bundle else serving(server, model, model_version or 0)
    if output and output.exists() and file.exists() and output.samefile(file):
        raise InputError(f"{output}: is the input")
    shows_lines = output is None and sys.stdout.isatty()
    target = to_file(output) if output else to_terminal(as_json=not shows_lines)
    with one_line_errors(server):
        total = count_sequences(file)
        with target as sink:
            score, summary = asyncio.run(_classify(backend, file, total, sink, shows_lines))
    # Without a file, only the results go to standard output.
    # click's own streams would drop characters that their encoding lacks.
    stream = sys.stdout if output else sys.stderr
    click.echo(f"{summary}{f' -> {output}' if output else ''}", file=stream)
    if score.labelled:
        click.echo(score.summary(), file=stream)
        click.echo(score.table(get_terminal_size().columns), file=stream)


def _check_alone(context: click.Context) -> None:
    """Raises InputError if --bundle is used with an option of servers."""
    for parameter in context.command.params:
        name = parameter.name or ""
        given = context.get_parameter_source(name) is ParameterSource.COMMANDLINE
        if given and name not in ("file", "bundle", "output"):
            hint = "; choose a model by its folder, such as models/jv" if name.startswith("model") else ""
            raise InputError(f"--bundle: not with {parameter.opts[0]}, which is for servers{hint}")


def _bundle_backend(path: Path) -> AbstractAsyncContextManager[Backend]:
    try:
        from unroll_client.cli.local import loaded
    except ModuleNotFoundError as error:
        raise InputError(f"--bundle needs {error.name}: pip install 'unroll-client[local]'") from None
    return loaded(path)


async def _classify(
    opened: AbstractAsyncContextManager[Backend], file: Path, total: int | None, sink: Output, shows_lines: bool
) -> tuple[Score, str]:
    done = 0
    bar = click.progressbar(
        count(),  # only `total` counts
        length=total,
        label=printable(file.name),
        show_pos=True,
        file=sys.stderr,
        hidden=not sys.stderr.isatty() or shows_lines,
    )
    async with opened as backend:
        score = Score(backend.class_labels)
        with bar:
            source = read_blocks(file, *backend.block_size)
            async with aclosing(classified(backend, file, source)) as results:
                async for block, result in results:
                    sink.write(block.ids, result)
                    score.add(block.labels, result)
                    done += len(block)
                    bar.update(len(block))
    return score, f"{done} sequences classified by {backend.name} version {backend.version}"
