"""The commands `unroll-export import` and `inspect`: networks trained elsewhere, as weights or as ONNX."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import click
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unroll_export import importing
from unroll_export.bidirectional import READOUTS
from unroll_export.model import Cell, Nonlinearity
from unroll_export.parity.runners import ParityError
from unroll_export.runs import TrainedRun
from unroll_export.steps.eager_module import EagerModule
from unroll_export.steps.importing import Imported, import_step
from unroll_export.steps.inspecting import report
from unroll_export.steps.plan import Options
from unroll_export.steps.proof import CASES, OnCase
from unroll_export.steps.reading import read_source
from unroll_export.steps.sequences import is_bidirectional
from unroll_export.terminal import export_trained, one_line, print_proofs, progress
from unroll_export.weight_files import ImportRefusedError, read_samples, read_weights
from unroll_export.whole import export_whole, import_whole
from unroll_proto import cli
from unroll_proto.bundle import BundleError, check_name
from unroll_proto.step_model import WHOLE

_OF_WEIGHTS = ("cell", "nonlinearity", "readout", "renamed", "mean", "std", "samples")
_OF_GRAPHS = ("state", "constant", "context", "chunk", "per_sequence", "initial", "alone", "form")
_FLAGS = {"renamed": "--map", "constant": "--set", "per_sequence": "--per-sequence"}
_ExistingFile = click.Path(exists=True, dir_okay=False, path_type=Path)
_File = click.Path(dir_okay=False, path_type=Path)


@click.command("import", short_help="Imports FILE: weights of PyTorch, or an ONNX graph with its state.")
@click.argument("file", type=_ExistingFile)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Model folder: MODELS/NAME.")
@click.option("--labels", type=_File, help="Text file, a class name a line.")
@click.option("--cell", type=click.Choice(get_args(Cell)), help="Checked against the shapes.")
@click.option("--nonlinearity", type=click.Choice(get_args(Nonlinearity)), help="Of an Elman network.")
@click.option("--readout", type=click.Choice(READOUTS), help="Of a bidirectional network: what goes into it.")
@click.option("--map", "renamed", multiple=True, metavar="OLD=NEW", help="Renames tensors; fc is the readout.")
@click.option("--mean", type=_File, help="npy file, subtracted from features.")
@click.option("--std", type=_File, help="npy file, divides features.")
@click.option("--samples", type=_File, help="npz file: inputs, outputs.")
@click.option("--state", multiple=True, metavar="IN=OUT", help="ONNX: output that gives the next value of an input.")
@click.option("--set", "constant", multiple=True, metavar="IN=VALUE", help="ONNX: fixes an input at a value.")
@click.option("--context", multiple=True, metavar="IN:N", help="ONNX: puts the last N values before the next step's.")
@click.option("--chunk", type=click.IntRange(1), help="ONNX: values of a step along an open dimension.")
@click.option("--per-sequence", multiple=True, metavar="IN", help="ONNX: an input with one value for a sequence.")
@click.option("--initial", multiple=True, metavar="IN=FILE.npy", help="ONNX: a state before the first step; or zeros.")
@click.option(
    "--form",
    type=click.Choice(["published", "matmul", "whole"]),
    help="ONNX: matmul is faster and rounds otherwise; whole is for graphs of whole sequences that look ahead.",
)
@click.option("--alone", is_flag=True, help="ONNX: runs sequences one at a time, for a graph that can't batch.")
def import_command(file: Path, out: Path, labels: Path | None, **given: Any) -> None:
    """Imports a recurrent network from FILE as the next version of the model folder --out.

    FILE is a safetensors file, or a state dict saved by torch.save: recurrent layers with a linear readout. An Elman
    network needs --nonlinearity, or --samples with outputs that it computed: logits or probabilities, of the last step
    or of every step. A bidirectional network likewise needs --readout or --samples, and classifies whole sequences. Or
    FILE is an ONNX graph of one timestep, whose states are among its inputs and outputs, or of whole sequences: see
    `unroll-export inspect FILE.onnx`.
    """
    graph = file.suffix == ".onnx"
    for name in _OF_WEIGHTS if graph else _OF_GRAPHS:
        if given[name]:
            flag = _FLAGS.get(name, f"--{name}")
            raise cli.InputError(f"{flag}: only for {'weights' if graph else 'ONNX files'}, {file.name} is not one")
    try:
        check_name(out.absolute().name)
        names = labels.read_text(encoding="utf-8").splitlines() if labels else []
        if graph:
            _import_graph(file, out, names, given)
            return
        weights = read_weights(file)
        if importing.is_bidirectional(weights):
            _import_bidirectional(file, weights, out, names, given)
            return
        if given["readout"]:
            raise cli.InputError("--readout: only for bidirectional networks")
        trained = _import_weights(file, weights, names, given)
    except (BundleError, ImportRefusedError, UnicodeDecodeError) as error:
        raise cli.InputError(str(error)) from error
    except OSError as error:
        raise cli.InputError(one_line(error, file)) from error
    export_trained(trained, file, out)


@click.command("inspect", short_help="Says what the ONNX graph in FILE is, and how it is imported.")
@click.argument("file", type=_ExistingFile)
def inspect_command(file: Path) -> None:
    """Shows the inputs and outputs of an ONNX graph, which of them are state and why, and the command to import it."""
    try:
        for line in report(read_source(file), file):
            click.echo(line)
    except ImportRefusedError as error:
        raise cli.InputError(str(error)) from error


def _import_weights(file: Path, weights: dict[str, Tensor], labels: list[str], given: dict[str, Any]) -> TrainedRun:
    model = importing.import_weights(weights, **_options(given))
    return importing.imported_run(model, file.name, _sha256(file), labels)


def _import_bidirectional(
    file: Path, weights: dict[str, Tensor], out: Path, labels: list[str], given: dict[str, Any]
) -> None:
    model = importing.import_bidirectional(weights, readout=given["readout"], **_options(given))
    names = importing.class_names(labels, model.fc.out_features)
    draws = torch.Generator().manual_seed(0)
    example = model.mean + model.std * torch.randn(8, 24, model.rnn.input_size, generator=draws)
    original, origin = EagerModule(model, example), (file.name, _sha256(file))
    _prove(file, lambda on_case: export_whole(original, out, names, on_case, origin))


def _options(given: dict[str, Any]) -> dict[str, Any]:
    return {
        "cell": given["cell"],
        "nonlinearity": given["nonlinearity"],
        "renamed": _pairs("--map", given["renamed"], "linear=fc"),
        "mean": _read_array(given["mean"]),
        "std": _read_array(given["std"]),
        "samples": read_samples(given["samples"]) if given["samples"] else None,
    }


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _import_graph(file: Path, out: Path, labels: list[str], given: dict[str, Any]) -> None:
    contexts = _pairs("--context", given["context"], "input:64", ":")
    for name, width in contexts.items():
        if not (width.isascii() and width.isdigit() and int(width)):
            raise ImportRefusedError(f"--context {name}:{width}: a number of values, 1 or more, expected")
    initial = _pairs("--initial", given["initial"], "state=FILE.npy")
    options = Options(
        states=_pairs("--state", given["state"], "h=hn"),
        constants=_pairs("--set", given["constant"], "sr=16000"),
        contexts={name: int(width) for name, width in contexts.items()},
        chunk=given["chunk"],
        per_sequence=given["per_sequence"],
        initial={name: _read_npy(Path(path)) for name, path in initial.items() if path != "zeros"},
        alone=given["alone"],
        matmul=given["form"] == "matmul",
    )
    source = read_source(file)
    if given["form"] == "whole" or (given["form"] is None and not options.states and is_bidirectional(source)):
        _prove(file, lambda on_case: import_whole(source, out, labels, on_case, options.constants))
    else:
        _prove(file, lambda on_case: import_step(source, options, out, labels, on_case))


def _prove(file: Path, write: Callable[[OnCase], Imported]) -> None:
    """Writes a bundle and prints its proof; errors become one-line errors of the command."""
    try:
        with progress(CASES) as on_case:
            imported = write(on_case)
    except ParityError as error:
        raise click.ClickException(f"{file}: {error}") from error
    click.echo(f"{imported.path}: written, with proof")
    print_proofs([imported.proven.proof], {})
    if imported.step.form == WHOLE:
        click.echo("  for whole sequences only, since it looks at more than the past: no streams, no sessions")
    if imported.proven.note:
        click.echo(f"  {imported.proven.note}", err=True)


def _pairs(flag: str, texts: tuple[str, ...], example: str, separator: str = "=") -> dict[str, str]:
    pairs: dict[str, str] = {}
    for text in texts:
        name, found, value = text.rpartition(separator) if separator == ":" else text.partition(separator)
        if not (name and found and value):
            raise ImportRefusedError(f"{flag}: {text!r}: {_FORMS.get(flag, 'NAME=VALUE')} expected, such as {example}")
        pairs[name] = value
    return pairs


_FORMS = {"--map": "OLD=NEW", "--context": "INPUT:NUMBER", "--state": "INPUT=OUTPUT"}


def _read_array(path: Path | None) -> NDArray[np.float32] | None:
    return None if path is None else _read_npy(path).astype(np.float32)


def _read_npy(path: Path) -> NDArray[Any]:
    try:
        array = np.load(path, allow_pickle=False)
    except ValueError as error:
        raise ImportRefusedError(f"{path}: not readable as npy: {error}") from None
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiu":
        raise ImportRefusedError(f"{path}: one array of numbers is expected")
    return array
