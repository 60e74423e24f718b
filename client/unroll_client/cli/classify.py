"""`unroll classify`: the class of every sequence of a file."""

import asyncio
import sys
from contextlib import aclosing
from itertools import count
from pathlib import Path
from shutil import get_terminal_size

import click

from unroll_client.cli.options import Server, one_line_errors, server_options
from unroll_client.cli.outputs import Output, to_file, to_terminal
from unroll_client.cli.pipeline import batches, classified
from unroll_client.cli.report import Score, printable
from unroll_proto.cli import InputError
from unroll_proto.sequences import count_sequences, read_sequences


@click.command("classify", short_help="Classifies every sequence of a file.")
@click.argument("file", type=click.Path(path_type=Path))
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
def classify_command(file: Path, model: str, model_version: int | None, output: Path | None, **options: object) -> None:
    """Classifies every sequence of FILE (Parquet, JSON Lines, npz or .ts).

    The output has the columns id, label, probability (of that label), probabilities and logits (lists). Where FILE
    has labels, accuracy and confusion matrix follow. Without -o, lines for people go to a terminal, and JSON Lines
    to anything else. Memory doesn't grow with FILE, except for npz.
    """
    server = Server(**options)  # type: ignore[arg-type] # click has checked the types
    if output and output.exists() and file.exists() and output.samefile(file):
        raise InputError(f"{output}: is the input")
    shows_lines = output is None and sys.stdout.isatty()
    target = to_file(output) if output else to_terminal(as_json=not shows_lines)
    with one_line_errors(server):
        total = count_sequences(file)
        with target as sink:
            score, summary = asyncio.run(_classify(server, file, total, model, model_version or 0, sink, shows_lines))
    # Without a file, only the results go to standard output.
    # click's own streams would drop characters that their encoding lacks.
    stream = sys.stdout if output else sys.stderr
    click.echo(f"{summary}{f' -> {output}' if output else ''}", file=stream)
    if score.labelled:
        click.echo(score.summary(), file=stream)
        click.echo(score.table(get_terminal_size().columns), file=stream)


async def _classify(
    server: Server, file: Path, total: int | None, name: str, version: int, sink: Output, shows_lines: bool
) -> tuple[Score, str]:
    async with server.client() as client:
        model = await client.model(name, version)
    score = Score(model.class_labels)
    done = 0
    bar = click.progressbar(
        count(),  # only `total` counts
        length=total,
        label=printable(file.name),
        show_pos=True,
        file=sys.stderr,
        hidden=not sys.stderr.isatty() or shows_lines,
    )
    # The server has answered before, so from here on a restart is waited for.
    async with server.client(wait_for_ready=True) as client:
        with bar:
            source = batches(read_sequences(file))
            async with aclosing(classified(client, model, file, source)) as results:
                async for batch, result in results:
                    sink.write(batch.ids, result)
                    score.add(batch.labels, result)
                    done += len(batch)
                    bar.update(len(batch))
    return score, f"{done} sequences classified by {model.name} version {model.version}"
