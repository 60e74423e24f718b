"""The command `unroll-export`: exports a training run as a bundle with proof, and repeats the proof of a bundle."""

from pathlib import Path
from typing import NoReturn

import click

from unroll_export.import_cli import import_command, inspect_command
from unroll_export.parity.runners import ParityError
from unroll_export.runs import RunError, load_run
from unroll_export.terminal import export_trained, one_line, print_proofs, progress
from unroll_export.verifying import verify
from unroll_proto import cli
from unroll_proto.bundle import BundleError, check_name

HELP = """Exports a training run, or a network trained elsewhere, as a model bundle, with proof.

\b
  unroll-export runs/jv --out models/jv
  unroll-export import net.safetensors --nonlinearity tanh --out models/net
  unroll-export inspect silero_vad.onnx
  unroll-export import silero_vad.onnx --set sr=16000 --context input:64 --chunk 512 --out models/vad
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


@group.command(short_help="Exports RUN; the default subcommand.")
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
        raise cli.InputError(one_line(error, run)) from error
    export_trained(trained, run, out)


group.add_command(import_command)
group.add_command(inspect_command)


@group.command("verify", short_help="Repeats the proof of the bundle BUNDLE on this machine.")
@click.argument("path", metavar="BUNDLE", type=click.Path(exists=True, file_okay=False, path_type=Path))
def verify_command(path: Path) -> None:
    """Repeats the proof of the bundle BUNDLE: its checksums, and every artifact against eager PyTorch."""
    try:
        with progress() as on_case:
            proven = verify(path, on_case)
    except (BundleError, ParityError) as error:
        raise click.ClickException(str(error)) from error
    except OSError as error:
        raise click.ClickException(one_line(error, path)) from error
    click.echo(f"{path}: proven on this machine")
    print_proofs(proven.proofs, proven.left_out)


def main() -> NoReturn:
    """Entry point of `unroll-export`."""
    cli.run("unroll-export", group, "unroll-export")
