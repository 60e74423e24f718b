"""The model bundle on disk: its file names, and the check that its checksums and its proof hold.

A version directory holds `manifest.json` and the files it names; see bundle.proto for what they say. Nothing of a
bundle but the manifest is parsed before its checksum has been found right.
"""

import hashlib
import math
import re
from pathlib import Path
from typing import TypeVar

from google.protobuf import json_format
from google.protobuf.message import Message

from unroll_proto.v1 import bundle_pb2 as pb

FORMAT = 1
TOLERANCE = 1e-5
"""Largest absolute difference of states and logits from eager PyTorch that passes."""

MANIFEST = "manifest.json"
WEIGHTS = "weights.safetensors"
ONNX_RNN = "model.onnx"
ONNX_SCAN = "model.scan.onnx"
TORCHSCRIPT = "model.ts"
PARITY = "parity.json"

FILES = {
    pb.ARTIFACT_KIND_WEIGHTS: WEIGHTS,
    pb.ARTIFACT_KIND_ONNX_RNN: ONNX_RNN,
    pb.ARTIFACT_KIND_ONNX_SCAN: ONNX_SCAN,
    pb.ARTIFACT_KIND_TORCHSCRIPT: TORCHSCRIPT,
    pb.ARTIFACT_KIND_PARITY: PARITY,
}
"""Every file of a bundle beside the manifest, by kind."""

MODEL_KINDS = (pb.ARTIFACT_KIND_ONNX_RNN, pb.ARTIFACT_KIND_ONNX_SCAN, pb.ARTIFACT_KIND_TORCHSCRIPT)
BITWISE_KINDS = (pb.ARTIFACT_KIND_ONNX_SCAN,)

MAX_MANIFEST_BYTES = 16 * 2**20

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_MessageT = TypeVar("_MessageT", bound=Message)


class BundleError(Exception):
    """A bundle, or a part of one, can't be trusted; the message is one line that says why."""


def check_name(name: str) -> None:
    """Raises BundleError where `name` can't be a model's name."""
    if not _NAME.fullmatch(name):
        raise BundleError(f"model name {name!r}: 1 to 64 letters, digits, '.', '_' or '-', a letter or digit first")


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, hex, lower case."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def to_json(message: Message) -> str:
    """The proto3 JSON of a message, as written into a bundle: every field, two spaces, a final newline."""
    return json_format.MessageToJson(message, always_print_fields_with_no_presence=True) + "\n"


def artifact_of(manifest: pb.BundleManifest, kind: "pb.ArtifactKind.ValueType") -> pb.Artifact:
    """The artifact of a kind; raises BundleError where there is not exactly one."""
    found = [artifact for artifact in manifest.artifacts if artifact.kind == kind]
    if len(found) != 1:
        raise BundleError(f"{MANIFEST}: {len(found)} artifacts of kind {pb.ArtifactKind.Name(kind)}, 1 expected")
    return found[0]


def read_artifact(path: Path, artifact: pb.Artifact) -> bytes:
    """Reads a file of the bundle at `path`; raises BundleError where it is not what the manifest vouches for."""
    file = path / artifact.file
    if file.is_symlink() or not file.is_file():
        raise BundleError(f"{file}: not a regular file")
    size = file.stat().st_size
    if size != artifact.size_bytes:
        raise BundleError(f"{file}: {size} bytes, {artifact.size_bytes} in the manifest")
    content = file.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    if digest != artifact.sha256:
        raise BundleError(f"{file}: sha256 {digest}, {artifact.sha256} in the manifest")
    return content


def read_manifest(path: Path) -> pb.BundleManifest:
    """Reads and checks the manifest of the bundle at `path`.

    Raises:
        BundleError: it is missing, not proto3 JSON of BundleManifest, of another format, or contradicts itself.
    """
    file = path / MANIFEST
    if not file.is_file():
        raise BundleError(f"{file}: no such file")
    if file.stat().st_size > MAX_MANIFEST_BYTES:
        raise BundleError(f"{file}: more than {MAX_MANIFEST_BYTES} bytes")
    manifest = _parse(file.read_bytes(), pb.BundleManifest(), file)
    _require(manifest.format == FORMAT, file, f"format {manifest.format}, {FORMAT} expected")
    check_name(manifest.name)
    for field in ("version", "input_size", "hidden_size", "output_size", "num_layers"):
        _require(getattr(manifest, field) > 0, file, f"{field} is 0")
    classes = max(manifest.output_size, 2)
    labels, features = manifest.class_labels, manifest.feature_names
    _require(len(labels) == len(set(labels)) == classes, file, f"class_labels: {classes} distinct ones expected")
    _require(len(features) == manifest.input_size, file, f"feature_names: {manifest.input_size} of them expected")
    for kind, name in FILES.items():
        artifact = artifact_of(manifest, kind)
        _require(artifact.file == name, file, f"{artifact.file!r} given for {name}")
    _require(len(manifest.artifacts) == len(FILES), file, f"{len(FILES)} artifacts expected")
    return manifest


def verify_bundle(path: Path) -> tuple[pb.BundleManifest, pb.ParityReport]:
    """Checks the whole bundle at `path`: manifest, sizes, checksums, and that the proof is of these very files.

    Raises:
        BundleError: any of it does not hold.
    """
    manifest = read_manifest(path)
    contents = {artifact.kind: read_artifact(path, artifact) for artifact in manifest.artifacts}
    file = path / PARITY
    report = _parse(contents[pb.ARTIFACT_KIND_PARITY], pb.ParityReport(), file)
    _require(report.format == FORMAT, file, f"format {report.format}, {FORMAT} expected")
    _require((report.name, report.version) == (manifest.name, manifest.version), file, "is another model's proof")
    _require(0 < report.tolerance <= TOLERANCE, file, f"tolerance {report.tolerance}, at most {TOLERANCE} expected")
    for kind in MODEL_KINDS:
        proofs = [proof for proof in report.proofs if proof.kind == kind]
        _require(len(proofs) == 1, file, f"{len(proofs)} proofs of {FILES[kind]}, 1 expected")
        _check_proof(proofs[0], artifact_of(manifest, kind), report.tolerance, file)
    return manifest, report


def _check_proof(proof: pb.ArtifactProof, artifact: pb.Artifact, tolerance: float, file: Path) -> None:
    _require(proof.sha256 == artifact.sha256, file, f"the proof of {artifact.file} is of another file")
    _require(len(proof.cases) > 0, file, f"the proof of {artifact.file} has no cases")
    _require(proof.bitwise or proof.kind not in BITWISE_KINDS, file, f"{artifact.file} is not proven to the bit")
    for case in proof.cases:
        diff = case.max_abs_diff
        passed = math.isfinite(diff) and 0 <= diff <= tolerance
        _require(passed, file, f"{artifact.file}: {case.name}: differs from eager by {diff}, over {tolerance}")
        same = not (proof.bitwise and case.bit_differences)
        _require(same, file, f"{artifact.file}: {case.name}: {case.bit_differences} values differ in their bits")


def _parse(content: bytes, message: _MessageT, file: Path) -> _MessageT:
    try:
        return json_format.Parse(content, message)
    except (json_format.ParseError, UnicodeDecodeError) as error:
        raise BundleError(f"{file}: {' '.join(str(error).split())}") from None


def _require(condition: bool, file: Path, problem: str) -> None:
    if not condition:
        raise BundleError(f"{file}: {problem}")
