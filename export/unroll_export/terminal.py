"""Terminal output of all commands of `unroll-export`: progress, results, errors."""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from unroll_export.exporting import export_run
from unroll_export.parity.gate import CASES
from unroll_export.parity.runners import ParityError
from unroll_export.runs import RunError, TrainedRun
from unroll_proto import cli
from unroll_proto.bundle import BundleError
from unroll_proto.v1 import bundle_pb2 as pb


def export_trained(trained: TrainedRun, source: Path, out: Path) -> None:
    """Exports a network and prints its proof; errors become one-line errors of the command."""
    try:
        with progress() as on_case:
            exported = export_run(trained, out, on_case)
    except RunError as error:
        raise cli.InputError(f"{source}: {error}") from error
    except (BundleError, ParityError) as error:
        raise click.ClickException(str(error)) from error
    except OSError as error:
        raise cli.InputError(one_line(error, out)) from error
    click.echo(f"{exported.path}: written, with proof")
    print_proofs(exported.proven.proofs, exported.proven.left_out)


@contextmanager
def progress(cases: int = CASES) -> Iterator[Callable[[str], None]]:
    """Shows a bar on a terminal's standard error; yields the function that `prove` calls with each case."""
    columns = (TextColumn("proving"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
    # Jupyter sets FORCE_COLOR, which is no terminal for a bar.
    console = Console(stderr=True, force_terminal=sys.stderr.isatty())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=cases)

        def on_case(name: str) -> None:
            bar.update(task, advance=1, description=name)

        yield on_case


def print_proofs(proofs: Iterable[pb.ArtifactProof], left_out: Mapping[str, str]) -> None:
    """Prints a line for each proof, and for each runtime that was not judged."""
    proofs = list(proofs)
    names = [f"{proof.file} ({proof.runtime})" for proof in proofs]
    width = max(map(len, names))
    for name, proof in zip(names, proofs, strict=True):
        if proof.kind == pb.ARTIFACT_KIND_ONNX_STEP:
            bits = "the same bits alone and in any batch" if proof.bitwise else "no bits promised"
            click.echo(f"  {name:{width}}  {len(proof.cases)} cases, {bits}, at most {proof.max_abs_diff:.1e} apart")
            continue
        bits = "the same bits however cut, " if proof.bitwise else ""
        worst = max(proof.cases, key=lambda case: case.worst_ratio)
        ratio = f"at most {proof.worst_ratio:.2f} of what float32 allows ({worst.name})"
        click.echo(
            f"  {name:{width}}  {len(proof.cases)} cases, {bits}{ratio}, {proof.max_abs_diff:.1e} from eager PyTorch"
        )
    for runtime, reason in left_out.items():
        click.echo(f"  not judged: {runtime}: {reason}")


def one_line(error: OSError, path: Path) -> str:
    """Returns the message of a file system error, with the path."""
    return f"{error.filename or path}: {error.strerror or error}"
