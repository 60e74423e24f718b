"""`unroll classify`: the class of every sequence of a file."""

import asyncio
import sys
from contextlib import aclosing
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from unroll_client.cli.options import Server, one_line_errors, server_options
from unroll_client.cli.outputs import Output, to_file, to_terminal
from unroll_client.cli.pipeline import batches, classified
from unroll_client.cli.report import Score
from unroll_proto.cli import InputError
from unroll_proto.sequences import count_sequences, read_sequences


@click.command("classify", short_help="Classifies every sequence of a file.")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--model", default="", metavar="NAME", help="Model to ask; needless where only one is served.")
@click.option("--model-version", type=click.IntRange(min=1), metavar="N", help="Its version.  [default: the newest]")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Write a .parquet, .jsonl or .csv file. It appears when it is complete.  [default: standard output]",
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
    target = to_file(output) if output else to_terminal(as_json=not sys.stdout.isatty())
    with one_line_errors(server):
        total = count_sequences(file)
        with target as sink:
            score, summary = asyncio.run(_classify(server, file, total, model, model_version or 0, sink))
    # What has no file shares standard output with nothing.
    console = Console(stderr=output is None, highlight=False)
    console.print(f"{summary}{f' -> {output}' if output else ''}", soft_wrap=True, markup=False)
    if score.labelled:
        console.print(score.summary(), soft_wrap=True, markup=False)
        console.print(score.table(console.width))


async def _classify(
    server: Server, file: Path, total: int | None, name: str, version: int, sink: Output
) -> tuple[Score, str]:
    async with server.client() as client:
        model = await client.model(name, version)
    score = Score(model.class_labels)
    count = 0
    console = Console(stderr=True)
    progress = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(show_speed=True),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
        transient=True,
    )
    # The server was there a moment ago. From here on, a restart of it is waited for.
    async with server.client(wait_for_ready=True) as client:
        with progress:
            bar = progress.add_task(file.name, total=total)
            source = batches(read_sequences(file))
            async with aclosing(classified(client, model, file, source)) as results:
                async for batch, result in results:
                    sink.write(batch.ids, result)
                    score.add(batch.labels, result)
                    count += len(batch)
                    progress.update(bar, completed=count)
    return score, f"{count} sequences classified by {model.name} version {model.version}"
