"""Exports a training run as a bundle version: artifacts, proof and manifest, then the move into the model folder."""

from collections.abc import Callable, Mapping
from pathlib import Path, PurePath
from typing import Any, NamedTuple, TypeAlias

from safetensors.torch import save

from unroll_export.bundle_writer import Draft
from unroll_export.graphs.onnx_rnn import build_onnx_rnn
from unroll_export.graphs.tensors import input_shapes, output_shapes, specs
from unroll_export.graphs.torchscript import build_torchscript
from unroll_export.model import RecurrentClassifier
from unroll_export.parity.gate import Proven, prove
from unroll_export.publishing import library_versions, model_name, now, publish
from unroll_export.runs import SUMMARY, RunError, TrainedRun
from unroll_proto import bundle
from unroll_proto.v1 import bundle_pb2 as pb

Kind: TypeAlias = "pb.ArtifactKind.ValueType"

BUILDERS: dict[Kind, Callable[[RecurrentClassifier[Any]], bytes]] = {
    pb.ARTIFACT_KIND_ONNX_RNN: build_onnx_rnn,
    pb.ARTIFACT_KIND_TORCHSCRIPT: build_torchscript,
}
"""Builder of each model artifact."""


class Exported(NamedTuple):
    """A bundle version that was written."""

    path: Path
    proven: Proven


def export_run(run: TrainedRun, out: Path, on_case: Callable[[str], None] = lambda _: None) -> Exported:
    """Writes `run` as the next version of the model folder `out`, whose name is the model's.

    Args:
        run: A finished training run.
        out: The model folder; created if missing.
        on_case: Called with each case of the proof before it is run.

    Raises:
        BundleError: `out` can't be a model folder, or servers would refuse the bundle.
        ParityError: an artifact differs from eager PyTorch. Nothing is left behind.
        RunError: the run's summary lacks a field of the manifest.
        OSError: `out` can't be written to.
    """
    name = model_name(out)
    training = _training_summary(run.summary)
    model = run.model.eval()
    with Draft(out) as draft:
        draft.write(bundle.WEIGHTS, save({key: value.contiguous() for key, value in model.state_dict().items()}))
        for kind, build in BUILDERS.items():
            draft.write(bundle.FILES[kind], build(model))
        written = {kind: (draft.path / bundle.FILES[kind]).read_bytes() for kind in BUILDERS}
        proven = prove(model, written, on_case)
        return Exported(publish(draft, _manifest(run, model, name, training), proven.proofs, proven.left_out), proven)


def artifact_shapes(model: RecurrentClassifier[Any]) -> tuple[list[pb.TensorSpec], list[pb.TensorSpec]]:
    """Returns the inputs and outputs of every model artifact for the manifest."""
    return specs(input_shapes(model)), specs(output_shapes(model))


def _manifest(
    run: TrainedRun, model: RecurrentClassifier[Any], name: str, training: pb.TrainingSummary
) -> pb.BundleManifest:
    """Makes the manifest without the version and the artifacts' checksums and sizes."""
    rnn = model.rnn
    artifacts = []
    for kind, file in bundle.FILES.items():
        inputs, outputs = artifact_shapes(model) if kind in BUILDERS else ([], [])
        artifacts.append(pb.Artifact(kind=kind, file=file, inputs=inputs, outputs=outputs))
    return pb.BundleManifest(
        format=bundle.FORMAT,
        name=name,
        architecture=model.architecture,
        input_size=rnn.input_size,
        hidden_size=rnn.hidden_size,
        output_size=model.fc.out_features,
        num_layers=rnn.num_layers,
        class_labels=run.class_labels,
        feature_names=run.feature_names,
        artifacts=artifacts,
        created=now(),
        libraries=library_versions(),
        training=training,
    )


def _training_summary(summary: Mapping[str, Any]) -> pb.TrainingSummary:
    try:
        return pb.TrainingSummary(
            data=PurePath(summary["data"]).name,
            data_sha256=summary["data_sha256"],
            seed=summary["seed"],
            epochs=summary["epochs"],
            training_sequences=summary["training_sequences"],
            longest_sequence=summary["longest_sequence"],
            test_accuracy=summary.get("test_accuracy"),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise RunError(f"{SUMMARY}: missing or of the wrong type: {error}") from error
