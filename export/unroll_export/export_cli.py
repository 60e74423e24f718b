"""The command `unroll-export`: a training run into a bundle with proof, and the proof of a bundle again."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn, get_args

import click
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from unroll_export import importing
from unroll_export.exporting import export_run
from unroll_export.model import Cell, Nonlinearity
from unroll_export.parity.gate import CASES, Proven
from unroll_export.parity.runners import ParityError
from unroll_export.runs import RunError, TrainedRun, load_run
from unroll_export.verifying import verify
from unroll_export.weight_files import ImportRefusedError, read_samples, read_weights
from unroll_proto import cli
from unroll_proto.bundle import BundleError, check_name

HELP = """Exports a training run, or a network trained elsewhere, as a model bundle, with proof.

\b
  unroll-export runs/jv --out models/jv
  unroll-export import net.safetensors --nonlinearity tanh --out models/net
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
    _export(trained, run, out)


@group.command("import", short_help="Imports WEIGHTS, trained elsewhere with PyTorch.")
@click.argument("weights", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Model folder: MODELS/NAME.")
@click.option("--cell", type=click.Choice(get_args(Cell)), help="Checked against the shapes.")
@click.option("--nonlinearity", type=click.Choice(get_args(Nonlinearity)), help="Of an Elman network.")
@click.option("--map", "renamed", multiple=True, metavar="OLD=NEW", help="Renames tensors; fc is the readout.")
@click.option("--labels", type=click.Path(dir_okay=False, path_type=Path), help="Text file, a class name a line.")
@click.option("--mean", type=click.Path(dir_okay=False, path_type=Path), help="npy file, subtracted from features.")
@click.option("--std", type=click.Path(dir_okay=False, path_type=Path), help="npy file, divides features.")
@click.option("--samples", type=click.Path(dir_okay=False, path_type=Path), help="npz file: inputs, outputs.")
def import_command(
    weights: Path,
    out: Path,
    cell: Cell | None,
    nonlinearity: Nonlinearity | None,
    renamed: tuple[str, ...],
    labels: Path | None,
    mean: Path | None,
    std: Path | None,
    samples: Path | None,
) -> None:
    """Imports a recurrent network with a linear readout from WEIGHTS, as the next version of the model folder --out.

    WEIGHTS is a safetensors file, or a state dict saved by torch.save. An Elman network needs --nonlinearity, or
    --samples with outputs that it computed: logits or probabilities, of the last step or of every step.
    """
    try:
        check_name(out.absolute().name)
        model = importing.import_weights(
            read_weights(weights),
            cell=cell,
            nonlinearity=nonlinearity,
            renamed=dict(_pair(each) for each in renamed),
            mean=_read_array(mean),
            std=_read_array(std),
            samples=None if samples is None else read_samples(samples),
        )
        names = labels.read_text(encoding="utf-8").splitlines() if labels else ()
        trained = importing.imported_run(model, weights, names)
    except (BundleError, ImportRefusedError, UnicodeDecodeError) as error:
        raise cli.InputError(str(error)) from error
    except OSError as error:
        raise cli.InputError(_one_line(error, weights)) from error
    _export(trained, weights, out)


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


def _export(trained: TrainedRun, source: Path, out: Path) -> None:
    try:
        with _progress() as on_case:
            exported = export_run(trained, out, on_case)
    except RunError as error:
        raise cli.InputError(f"{source}: {error}") from error
    except (BundleError, ParityError) as error:
        raise click.ClickException(str(error)) from error
    except OSError as error:
        raise cli.InputError(_one_line(error, out)) from error
    click.echo(f"{exported.path}: written, with proof")
    _print(exported.proven)


def _pair(text: str) -> tuple[str, str]:
    old, separator, new = text.partition("=")
    if not (old and separator and new):
        raise ImportRefusedError(f"--map: {text!r}: OLD=NEW expected, such as linear=fc")
    return old, new


def _read_array(path: Path | None) -> NDArray[np.float32] | None:
    if path is None:
        return None
    try:
        array = np.load(path, allow_pickle=False)
    except ValueError as error:
        raise ImportRefusedError(f"{path}: not readable as npy: {error}") from None
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiu":
        raise ImportRefusedError(f"{path}: one array of numbers is expected")
    return array.astype(np.float32)


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
