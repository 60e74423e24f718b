"""The last step of every export: writes proof and manifest, and moves the bundle into the model folder."""

import platform
from collections.abc import Iterable, Mapping
from importlib.metadata import version as version_of
from pathlib import Path

from google.protobuf.timestamp_pb2 import Timestamp

from unroll_export.bundle_writer import Draft, VersionTaken
from unroll_proto import bundle
from unroll_proto.v1 import bundle_pb2 as pb

LIBRARIES = ("numpy", "onnx", "onnxruntime", "protobuf", "safetensors", "torch")
PACKAGES = ("unroll-engine", "unroll-export", "unroll-proto")


def model_name(out: Path) -> str:
    """Returns the name of the model whose folder is `out`.

    Raises:
        BundleError: `out` can't be a model folder.
    """
    name = out.absolute().name
    bundle.check_name(name)
    if (out / bundle.MANIFEST).exists():
        raise bundle.BundleError(f"{out}: is a version of a bundle; the folder above it is the model's")
    return name


def publish(
    draft: Draft, manifest: pb.BundleManifest, proofs: Iterable[pb.ArtifactProof], left_out: Mapping[str, str]
) -> Path:
    """Writes the proof and the manifest of a draft, gives it the next version, and returns its path.

    Args:
        draft: The draft, with all other files.
        manifest: The manifest; version, and checksums and sizes of files, are filled in.
        proofs: See ParityReport.
        left_out: See ParityReport.

    Raises:
        BundleError: servers would refuse the bundle.
    """
    while True:
        manifest.version = draft.next_version()
        _describe(draft, manifest, proofs, left_out)
        try:
            return draft.publish(manifest.version)
        except VersionTaken:
            continue


def cpu_name() -> str:
    """Returns the model name of the processor, or its architecture if the name is unknown."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def library_versions() -> dict[str, str]:
    """Returns the versions of Python and of the libraries that make bundles, by distribution name."""
    return {"python": platform.python_version()} | {name: version_of(name) for name in LIBRARIES + PACKAGES}


def now() -> Timestamp:
    """Returns the current time."""
    timestamp = Timestamp()
    timestamp.GetCurrentTime()
    return timestamp


def _describe(
    draft: Draft, manifest: pb.BundleManifest, proofs: Iterable[pb.ArtifactProof], left_out: Mapping[str, str]
) -> None:
    """Writes the proof and the manifest, and verifies the bundle as servers do."""
    report = pb.ParityReport(
        format=bundle.PARITY_FORMAT,
        name=manifest.name,
        version=manifest.version,
        proofs=proofs,
        left_out=left_out,
        libraries=dict(manifest.libraries),
        cpu=cpu_name(),
        created=manifest.created,
    )
    draft.write(bundle.PARITY, bundle.to_json(report).encode())
    for artifact in manifest.artifacts:
        file = draft.path / artifact.file
        artifact.sha256 = bundle.sha256_of(file)
        artifact.size_bytes = file.stat().st_size
    draft.write(bundle.MANIFEST, bundle.to_json(manifest).encode())
    bundle.verify_bundle(draft.path)
