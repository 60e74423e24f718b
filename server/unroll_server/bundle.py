"""Bundles on disk: finds them in the model repository, verifies them, reads what a runtime needs."""

from dataclasses import dataclass
from pathlib import Path

from unroll_proto import bundle
from unroll_proto.v1 import bundle_pb2
from unroll_server.types import ModelKey, ModelSpec

ARCHITECTURES = ("simple_rnn",)


def find_bundles(root: Path) -> list[Path]:
    """The version folders under `root`, by name, then version."""
    versions = [path for path in root.glob("*/*") if path.name.isascii() and path.name.isdigit() and path.is_dir()]
    return sorted(versions, key=lambda path: (path.parent.name, int(path.name)))


@dataclass(frozen=True, slots=True)
class VerifiedBundle:
    """A bundle whose checksums and proof hold.

    Attributes:
        path: Its folder.
        spec: What its model takes and gives.
        manifest: What its maker says of it.
        report: The proof.
    """

    path: Path
    spec: ModelSpec
    manifest: bundle_pb2.BundleManifest
    report: bundle_pb2.ParityReport

    def read(self, kind: "bundle_pb2.ArtifactKind.ValueType") -> bytes:
        """Content of an artifact; its checksum is checked again, so that what is loaded is what was verified."""
        return bundle.read_artifact(self.path, bundle.artifact_of(self.manifest, kind))

    def max_abs_diff(self, kind: "bundle_pb2.ArtifactKind.ValueType") -> float:
        """From the proof: the artifact's largest absolute difference from eager PyTorch."""
        return next(proof.max_abs_diff for proof in self.report.proofs if proof.kind == kind)


def verify(path: Path) -> VerifiedBundle:
    """Verifies the bundle `NAME/VERSION/` at `path`; nothing but JSON of it is parsed.

    Raises:
        BundleError: layout, checksums or proof do not hold, or it is not for this server.
    """
    manifest, report = bundle.verify_bundle(path)
    key = ModelKey(manifest.name, manifest.version)
    if str(key) != f"{path.parent.name}/{path.name}":
        raise bundle.BundleError(f"{path}: the manifest says {key}")
    if manifest.architecture not in ARCHITECTURES:
        raise bundle.BundleError(f"{path}: architecture {manifest.architecture!r} is not one of {ARCHITECTURES}")
    spec = ModelSpec(
        key=key,
        architecture=manifest.architecture,
        input_size=manifest.input_size,
        hidden_size=manifest.hidden_size,
        output_size=manifest.output_size,
        num_layers=manifest.num_layers,
        class_labels=tuple(manifest.class_labels),
        feature_names=tuple(manifest.feature_names),
    )
    return VerifiedBundle(path, spec, manifest, report)
