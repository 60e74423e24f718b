"""The command `unroll-train`: trains a recurrent classifier into a run folder, and draws reports of runs."""

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, get_args

import click
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from unroll_export import experiment, sources
from unroll_export.datasets import Dataset
from unroll_export.model import Cell, Nonlinearity
from unroll_export.runs import REPORT, RunError
from unroll_export.training import Hyperparameters, TrainingError
from unroll_proto import cli
from unroll_proto.sequences import SUFFIXES, Columns, SequenceError
from unroll_proto.sequences.options import column_options, columns_of

DEFAULTS = Hyperparameters()
MOST_RUNS = 6
MOST_RECALLS = 20
"""Most classes whose recall is printed; `summary.json` has all."""
DATA = f"{sources.JAPANESE_VOWELS}, {sources.RECALL} or a file, folder, glob or URL ({', '.join(SUFFIXES)})"


class FiniteRange(click.FloatRange):
    """A range of floats that excludes NaN and infinity."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Converts as FloatRange does, but refuses NaN."""
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return number


class TrainGroup(cli.DefaultGroup):
    """`unroll-train`, with and without the name of its default subcommand."""

    default = "train"


HELP = """Trains a recurrent classifier (RNN, LSTM or GRU) on labelled sequences.

\b
  unroll-train --data japanese-vowels --out runs/jv
  unroll-train --data FILE --out runs/mine
  unroll-train report runs/jv

A file holds the columns `sequence` and `label`, and optionally `split` (train, validation, test) and `id`. If it has
no test or validation sequences, some training sequences are held out, the same share of every class. Two
classes make a binary model: one logit, whose positive class is the second label. Training stops early on the validation
sequences and restores the best weights; the test sequences are used only at the end.
"""


@click.group(cls=TrainGroup, invoke_without_command=True, context_settings={"show_default": True}, help=HELP)
@click.pass_context
def group(ctx: click.Context) -> None:
    """The command; see HELP."""
    if ctx.invoked_subcommand is None:
        raise click.UsageError(f"--data is missing: {DATA}")


@group.command(short_help="Trains a model; the default subcommand.")
@click.option("--data", required=True, metavar="NAME|FILE", help=f"Training data: {DATA}.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Run folder to write; new or empty.")
@click.option("--resume", is_flag=True, help="Continue from the last checkpoint in --out, with the same options.")
@click.option("--overwrite", is_flag=True, help="Replace the run in --out.")
@click.option("--test-data", help="File whose sequences are the test split.")
@column_options
@click.option(
    "--lag", type=click.IntRange(min=1), default=5, help="Steps of noise between the class and the end (recall)."
)
@click.option(
    "--cell",
    type=click.Choice(get_args(Cell)),
    default=DEFAULTS.cell,
    help="lstm and gru remember over more steps.",
)
@click.option(
    "--nonlinearity",
    type=click.Choice(get_args(Nonlinearity)),
    default=DEFAULTS.nonlinearity,
    help="Nonlinearity of the cell rnn.",
)
@click.option("--hidden-size", type=click.IntRange(min=1), default=DEFAULTS.hidden_size)
@click.option("--layers", "num_layers", type=click.IntRange(min=1), default=DEFAULTS.num_layers)
@click.option(
    "--dropout",
    type=FiniteRange(min=0, max=1, max_open=True),
    default=DEFAULTS.dropout,
    help="Dropout between layers, in training.",
)
@click.option(
    "--epochs",
    type=click.IntRange(min=1),
    show_default="150, more for few sequences",
    help="Most epochs.",
)
@click.option("--batch-size", type=click.IntRange(min=1), default=DEFAULTS.batch_size)
@click.option(
    "--lr",
    "learning_rate",
    type=FiniteRange(min=0, min_open=True),
    show_default="0.002; 0.005 for lstm and gru",
    help="Learning rate of AdamW; falls to 0 over --epochs.",
)
@click.option("--weight-decay", type=FiniteRange(min=0), default=DEFAULTS.weight_decay)
@click.option(
    "--clip", type=FiniteRange(min=0, min_open=True), default=DEFAULTS.clip, help="Largest norm of the gradient."
)
@click.option(
    "--class-weights",
    type=click.Choice(["none", "balanced"]),
    default=DEFAULTS.class_weights,
    help="balanced: rare classes count as much as frequent ones.",
)
@click.option(
    "--input-noise",
    type=FiniteRange(min=0),
    default=DEFAULTS.input_noise,
    help="Noise on training inputs, in standard deviations of each feature.",
)
@click.option(
    "--patience",
    type=click.IntRange(min=1),
    show_default="4/15 of the epochs",
    help="Epochs without a lower validation loss after which training stops.",
)
@click.option(
    "--validation-fraction",
    type=FiniteRange(min=0, max=1, max_open=True),
    default=DEFAULTS.validation_fraction,
    help="Share held out for early stopping, if the file has no such split; 0: no stopping.",
)
@click.option(
    "--test-fraction",
    type=FiniteRange(min=0, max=1, max_open=True),
    default=DEFAULTS.test_fraction,
    help="Share held out as the test split, if the file has none; 0: no test split.",
)
@click.option("--seed", type=click.IntRange(min=0, max=2**32 - 1), default=DEFAULTS.seed)
@click.option("--threads", type=click.IntRange(min=1), default=DEFAULTS.threads, help="Of torch.")
def train(
    data: str, out: Path, resume: bool, overwrite: bool, test_data: str | None, lag: int, **settings: Any
) -> None:
    """Trains a model; the default subcommand of `unroll-train`."""
    if resume and overwrite:
        raise click.UsageError("--resume and --overwrite exclude each other")
    columns = columns_of(settings)
    hyperparameters = Hyperparameters(**settings)
    if hyperparameters.dropout and hyperparameters.num_layers == 1:
        raise click.UsageError("--dropout is between layers: it needs --layers 2 or more")
    if hyperparameters.nonlinearity != DEFAULTS.nonlinearity and hyperparameters.cell != "rnn":
        raise click.UsageError(f"--nonlinearity goes with --cell rnn, not {hyperparameters.cell}")
    torch.set_num_threads(hyperparameters.threads)
    torch.use_deterministic_algorithms(True)
    start: experiment.Start = "resume" if resume else "overwrite" if overwrite else "new"
    try:
        dataset = _load(data, test_data, columns, lag, hyperparameters)
        with _progress(hyperparameters.resolved(dataset).epochs or 0) as on_epoch:
            summary = experiment.run(dataset, hyperparameters, out, start, on_epoch)
    except (SequenceError, sources.DataMissingError, RunError) as error:
        raise cli.InputError(str(error)) from error
    except TrainingError as error:
        raise click.ClickException(f"{out}: {error}") from error
    except OSError as error:
        raise cli.InputError(f"{error.filename or out}: {(error.strerror or str(error)).lower()}") from error
    _print_result(out, summary)


@group.command(short_help="Draws a run, or compares several, as one PNG.")
@click.argument("runs", type=click.Path(path_type=Path), nargs=-1, required=True, metavar="RUN...")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help=f"PNG to write.  [default: RUN/{REPORT}]",
)
def report(runs: tuple[Path, ...], output: Path | None) -> None:
    """Draws loss, accuracy, confusion matrix and gradient flow of the run folder RUN as one PNG.

    Of several run folders, 6 at most, it draws accuracy and gradient flow side by side.
    """
    # Importing matplotlib takes a second, which training would waste.
    from unroll_export.report import write_report

    if len(runs) > MOST_RUNS:
        raise click.UsageError(f"RUN: {len(runs)} given, {MOST_RUNS} at most can be compared")
    if output is None:
        if len(runs) > 1:
            raise click.UsageError("--output is required when several runs are compared")
        output = runs[0] / REPORT
    try:
        write_report(runs, output)
    except RunError as error:
        raise cli.InputError(str(error)) from error
    except OSError as error:
        raise cli.InputError(f"{error.filename or output}: {(error.strerror or str(error)).lower()}") from error
    click.echo(str(output))


def main() -> NoReturn:
    """Runs `unroll-train` and exits."""
    cli.run("unroll-train", group, "unroll-export")


def _load(data: str, test_data: str | None, columns: Columns, lag: int, settings: Hyperparameters) -> Dataset:
    built_in = data in (sources.JAPANESE_VOWELS, sources.RECALL)
    given = click.get_current_context().get_parameter_source("lag")
    if data != sources.RECALL and given is click.core.ParameterSource.COMMANDLINE:
        raise click.UsageError(f"--lag goes with --data {sources.RECALL}")
    if built_in and test_data is not None:
        raise click.UsageError("--test-data goes with a file")
    if data == sources.JAPANESE_VOWELS:
        return sources.japanese_vowels(validation=settings.validation_fraction, seed=settings.seed)
    if data == sources.RECALL:
        return sources.recall(lag=lag, seed=settings.seed)
    if not any(mark in data for mark in "./*?[") and not Path(data).exists():
        raise click.UsageError(f"--data: {data!r} is not a file; expected {DATA}")
    return sources.from_file(
        data,
        test_data,
        columns=columns,
        validation=settings.validation_fraction,
        test=settings.test_fraction,
        seed=settings.seed,
    )


def _print_result(out: Path, summary: dict[str, Any]) -> None:
    judged = summary["splits"][summary["judged_on"]]
    click.echo(
        f"{out}: {summary['judged_on']} accuracy {summary['accuracy']:.4f} on {judged['sequences']} sequences "
        f"(most frequent class {summary['majority_accuracy']:.4f}), macro-F1 {summary['macro_f1']:.4f}, "
        f"weights of epoch {summary['best_epoch']} of {summary['epochs']}"
    )
    recalls = [f"{each['label']} {each['recall']:.2f}" for each in summary["per_class"] if each["support"]]
    shown = ", ".join(recalls[:MOST_RECALLS]) + (", ..." if len(recalls) > MOST_RECALLS else "")
    click.echo(f"recall by class: {shown}")
    for warning in summary["warnings"]:
        click.echo(f"warning: {warning}", err=True)


def _describe(figures: dict[str, float]) -> str:
    text = f"loss {figures['train_loss']:.4f}, accuracy {figures['train_accuracy']:.4f}"
    if "validation_loss" in figures:
        text += f"; validation {figures['validation_loss']:.4f}, {figures['validation_accuracy']:.4f}"
    return text


@contextmanager
def _progress(epochs: int) -> Iterator[Callable[[dict[str, float]], None]]:
    """Shows the epochs on standard error: a bar on a terminal, else a line for every tenth epoch."""
    console = Console(stderr=True, force_terminal=sys.stderr.isatty())
    if not console.is_terminal:
        yield (
            lambda figures: (
                click.echo(f"epoch {figures['epoch']} of {epochs}: {_describe(figures)}", err=True)
                if figures["epoch"] % 10 == 0
                else None
            )
        )
        return
    columns = (
        TextColumn("epoch"),
        MofNCompleteColumn(),
        BarColumn(),
        TextColumn("{task.description}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=epochs)
        yield lambda figures: progress.update(task, completed=int(figures["epoch"]), description=_describe(figures))
