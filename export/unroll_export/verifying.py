"""Repeats the proof of a bundle, on this machine and with its libraries."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load

from unroll_engine.kernel import UnsupportedNetworkError, read_onnx
from unroll_export.exporting import artifact_shapes
from unroll_export.model import CELLS, Nonlinearity, RecurrentClassifier, build
from unroll_export.parity.gate import Proven, prove
from unroll_export.steps.importing import verify_step
from unroll_export.whole import verify_whole
from unroll_proto import bundle
from unroll_proto.step_model import WHOLE
from unroll_proto.v1 import bundle_pb2 as pb


def verify(path: Path, on_case: Callable[[str], None] = lambda _: None) -> Proven:
    """Verifies the bundle at `path` in full: checksums, its own proof, and a new proof of its files.

    Raises:
        BundleError: the bundle is incomplete or inconsistent.
        ParityError: an artifact differs from eager PyTorch on this machine.
    """
    manifest, _ = bundle.verify_bundle(path)
    if manifest.HasField("step"):
        again = verify_whole if manifest.step.form == WHOLE else verify_step
        return Proven([again(path, manifest, on_case).proof], {})
    model = _eager_model(path, manifest)
    contents = {}
    for kind in bundle.MODEL_KINDS:
        artifact = bundle.artifact_of(manifest, kind)
        if (list(artifact.inputs), list(artifact.outputs)) != artifact_shapes(model):
            raise bundle.BundleError(f"{path / bundle.MANIFEST}: {artifact.file} has other tensors than its sizes say")
        contents[kind] = bundle.read_artifact(path, artifact)
    return prove(model, contents, on_case)


def _eager_model(path: Path, manifest: pb.BundleManifest) -> RecurrentClassifier[Any]:
    """Returns the network of `weights.safetensors`, in eval mode."""
    file = path / bundle.WEIGHTS
    cell = CELLS.get(manifest.architecture)
    if cell is None:
        raise bundle.BundleError(f"{path / bundle.MANIFEST}: architecture {manifest.architecture!r} is not known")
    sizes = (manifest.input_size, manifest.hidden_size, manifest.output_size, manifest.num_layers)
    content = bundle.read_artifact(path, bundle.artifact_of(manifest, pb.ARTIFACT_KIND_WEIGHTS))
    try:
        weights = load(content)
    except SafetensorError as error:
        raise bundle.BundleError(f"{file}: not readable as safetensors: {error}") from error
    if len(weights) != len(build(cell, 1, 1, 1).state_dict()) + 4 * (manifest.num_layers - 1):
        raise bundle.BundleError(f"{file}: {len(weights)} tensors don't make {manifest.num_layers} layers")
    with torch.device("meta"):  # The sizes come from a file: nothing is allocated before they are checked.
        expected = {name: (value.dtype, value.shape) for name, value in build(cell, *sizes).state_dict().items()}
    if {name: (value.dtype, value.shape) for name, value in weights.items()} != expected:
        raise bundle.BundleError(f"{file}: names, types or shapes are not those of the manifest's sizes")
    model = build(cell, *sizes, nonlinearity=_nonlinearity(path, manifest))
    model.load_state_dict(weights)
    return model.eval()


def _nonlinearity(path: Path, manifest: pb.BundleManifest) -> Nonlinearity:
    """Returns the nonlinearity of `model.onnx`, which the weights do not show; "tanh" if the graph is invalid."""
    content = bundle.read_artifact(path, bundle.artifact_of(manifest, pb.ARTIFACT_KIND_ONNX_RNN))
    try:
        return "relu" if read_onnx(content).cell == "rnn_relu" else "tanh"
    except UnsupportedNetworkError:
        return "tanh"
