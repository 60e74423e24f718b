"""The command `unroll-export`: a training run into a bundle with proof, and the proof of a bundle again."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from unroll_export.exporting import export_run
from unroll_export.parity.gate import CASES, Proven
from unroll_export.parity.runners import ParityError
from unroll_export.runs import RunError, load_run
from unroll_export.verifying import verify
from unroll_proto import cli
from unroll_proto.bundle import BundleError, check_name

HELP = """Exports a training run as a model bundle, with proof.

\b
  unroll-export runs/jv --out models/jv
  unroll-export verify models/jv/1

The next version is written into the model folder --out, whose name is the model's: the weights, the model as ONNX (RNN
operator), as TorchScript, and the proof that each of them computes what eager PyTorch computes.
Without the proof nothing is written.
"""


class ExportGroup(cli.DefaultGroup):
    """`unroll-export`, with and without the name of its default subcommand."""

    default = "run"


@click.group(cls=ExportGroup, invoke_without_command=True, help=HELP)
@click.pass_context
def group(ctx: click.Context) -> None:
    """The command; see HELP."""
    if ctx.invoked_subcommand is None:
        raise click.UsageError("RUN is missing: the folder of a training run")


@group.command(short_help="Exports RUN: what happens without a subcommand.")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Model folder: MODELS/NAME.")
def run(run: Path, out: Path) -> None:
    """Exports the training run in the folder RUN as the next version of the model folder --out."""
    try:
        check_name(out.absolute().name)
        trained = load_run(run)
    except (BundleError, RunError) as error:
        raise cli.InputError(str(error)) from error
    except OSError as error:
        raise cli.InputError(_one_line(error, run)) from error
    try:
        with _progress() as on_case:
            exported = export_run(trained, out, on_case)
    except RunError as error:
        raise cli.InputError(f"{run}: {error}") from error
    except (BundleError, ParityError) as error:
        raise click.ClickException(str(error)) from error
    except OSError as error:
        raise cli.InputError(_one_line(error, out)) from error
    click.echo(f"{exported.path}: written, with proof")
    _print(exported.proven)


@group.command("verify", short_help="Proves the bundle in the folder BUNDLE again, on this machine.")
@click.argument("path", metavar="BUNDLE", type=click.Path(exists=True, file_okay=False, path_type=Path))
def verify_command(path: Path) -> None:
    """Proves the bundle in the folder BUNDLE again: its checksums, and every artifact against eager PyTorch here."""
    try:
        with _progress() as on_case:
            proven = verify(path, on_case)
    except (BundleError, ParityError) as error:
        raise click.ClickException(str(error)) from error
    except OSError as error:
        raise click.ClickException(_one_line(error, path)) from error
    click.echo(f"{path}: proven on this machine")
    _print(proven)


def main() -> NoReturn:
    """Entry point."""
    cli.run("unroll-export", group, "unroll-export")


@contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """A bar on a terminal's standard error; gives what `prove` calls with each case."""
    columns = (TextColumn("proving"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=CASES)

        def on_case(name: str) -> None:
            progress.update(task, advance=1, description=name)

        yield on_case


def _print(proven: Proven) -> None:
    names = [f"{proof.file} ({proof.runtime})" for proof in proven.proofs]
    width = max(map(len, names))
    for name, proof in zip(names, proven.proofs, strict=True):
        bits = "the same bits however cut, " if proof.bitwise else ""
        worst = max(proof.cases, key=lambda case: case.worst_ratio)
        ratio = f"at most {proof.worst_ratio:.2f} of what float32 allows ({worst.name})"
        click.echo(
            f"  {name:{width}}  {len(proof.cases)} cases, {bits}{ratio}, {proof.max_abs_diff:.1e} from eager PyTorch"
        )
    for runtime, reason in proven.left_out.items():
        click.echo(f"  not judged: {runtime}: {reason}")


def _one_line(error: OSError, path: Path) -> str:
    return f"{error.filename or path}: {error.strerror or error}"
