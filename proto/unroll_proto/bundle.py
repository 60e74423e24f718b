"""The model bundle on disk: its file names, and the verification of its checksums and its proof.

A version directory holds `manifest.json` and the files that it names; bundle.proto documents their contents. Only the
manifest is parsed before its checksum is verified, and no file is read before its size is.
"""

import hashlib
import io
import math
import os
import re
import stat
from pathlib import Path
from typing import TypeVar

from google.protobuf import json_format
from google.protobuf.message import Message

from unroll_proto import step_model
from unroll_proto.v1 import bundle_pb2 as pb

FORMAT = 1
PARITY_FORMAT = 2
"""Layout of parity.json; 1 is still read."""
TOLERANCE = 1e-5
"""Largest absolute difference from eager PyTorch that a proof of layout 1 lets pass."""

MANIFEST = "manifest.json"
WEIGHTS = "weights.safetensors"
ONNX_RNN = "model.onnx"
TORCHSCRIPT = "model.ts"
PARITY = "parity.json"

FILES = {
    pb.ARTIFACT_KIND_WEIGHTS: WEIGHTS,
    pb.ARTIFACT_KIND_ONNX_RNN: ONNX_RNN,
    pb.ARTIFACT_KIND_TORCHSCRIPT: TORCHSCRIPT,
    pb.ARTIFACT_KIND_PARITY: PARITY,
}
"""File names of a trained network's bundle by kind, without the manifest."""
STEP_FILES = {pb.ARTIFACT_KIND_ONNX_STEP: ONNX_RNN, pb.ARTIFACT_KIND_PARITY: PARITY}
"""File names of a step model's bundle, likewise."""

_OLD_FILES = {pb.ARTIFACT_KIND_ONNX_SCAN: "model.scan.onnx"}
"""Files that older bundles may have; they are verified and not used."""

MODEL_KINDS = (pb.ARTIFACT_KIND_ONNX_RNN, pb.ARTIFACT_KIND_TORCHSCRIPT)

MAX_VERSION = 2**32 - 1
"""Highest version number."""

MAX_MANIFEST_BYTES = 4 * 2**20
MAX_PARITY_BYTES = 16 * 2**20
MAX_MODEL_BYTES = 2**31 - 1
"""Most bytes of a file with weights; protobuf, and so ONNX, allows no more."""
MAX_SIZES = {"input_size": 2**14, "hidden_size": 2**14, "output_size": 2**16, "num_layers": 2**8}
"""Largest network that is accepted, by field of the manifest."""
MAX_STEP_MODEL_BYTES = 2**29
"""Most bytes of the graph of a step model, whose weights the manifest does not describe."""

# Most bytes of graph, names and code beside the weights; exported files have less than a tenth of it.
_BESIDE_WEIGHTS = 2**20
_BESIDE_LAYER = 2**14

_GATES = {"simple_lstm": 4, "simple_gru": 3}
"""Weight matrices of a layer by architecture; one for others."""

MOST_TEXT_BYTES = 1024
"""Most bytes of a class label or a feature name, in UTF-8. Labels are part of every answer."""
MOST_SAID = 800
"""Approximate length of an error message about a bundle, in characters."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_MessageT = TypeVar("_MessageT", bound=Message)


class BundleError(Exception):
    """A bundle, or a part of one, can't be trusted. The message is one line with the reason.

    Args:
        problem: The reason. It may quote the bundle at any length: the middle of a long text and unprintable
            characters are left out.
    """

    def __init__(self, problem: str) -> None:
        line = " ".join(problem.split())
        if len(line) > MOST_SAID:
            line = f"{line[: MOST_SAID // 2]} ... {line[-MOST_SAID // 2 :]}"
        super().__init__("".join(each if each.isprintable() else "?" for each in line))


def check_name(name: str) -> None:
    """Raises BundleError if `name` is not a valid model name."""
    if not _NAME.fullmatch(name):
        raise BundleError(f"model name {name!r}: 1 to 64 letters, digits, '.', '_' or '-', a letter or digit first")


def sha256_of(path: Path) -> str:
    """Returns the SHA-256 of a file, in lower-case hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def to_json(message: Message) -> str:
    """Returns the proto3 JSON of a message as bundles hold it: every field, two spaces, a final newline."""
    return json_format.MessageToJson(message, always_print_fields_with_no_presence=True) + "\n"


def files_of(manifest: pb.BundleManifest) -> dict["pb.ArtifactKind.ValueType", str]:
    """Returns the file names of a bundle by kind, without the manifest."""
    if manifest.HasField("step"):
        return STEP_FILES
    there = {artifact.kind for artifact in manifest.artifacts}
    return FILES | {kind: name for kind, name in _OLD_FILES.items() if kind in there}


def artifact_of(manifest: pb.BundleManifest, kind: "pb.ArtifactKind.ValueType") -> pb.Artifact:
    """Returns the artifact of a kind; raises BundleError unless there is exactly one."""
    found = [artifact for artifact in manifest.artifacts if artifact.kind == kind]
    if len(found) != 1:
        raise BundleError(f"{MANIFEST}: {len(found)} artifacts of kind {pb.ArtifactKind.Name(kind)}, 1 expected")
    return found[0]


def weights_bytes(manifest: pb.BundleManifest) -> int:
    """Returns the bytes of all float32 parameters of the network in the manifest, standardization included."""
    features, hidden, layers = manifest.input_size, manifest.hidden_size, manifest.num_layers
    gates = _GATES.get(manifest.architecture, 1)
    recurrent = gates * ((features + hidden + 2) * hidden + (layers - 1) * (2 * hidden + 2) * hidden)
    return 4 * (2 * features + recurrent + (hidden + 1) * manifest.output_size)


def size_limit(manifest: pb.BundleManifest, kind: "pb.ArtifactKind.ValueType") -> int:
    """Returns the most bytes that an artifact of this kind can have for the network in the manifest."""
    if kind == pb.ARTIFACT_KIND_PARITY:
        return MAX_PARITY_BYTES
    if kind == pb.ARTIFACT_KIND_ONNX_STEP:
        return MAX_STEP_MODEL_BYTES
    return min(weights_bytes(manifest) + _BESIDE_WEIGHTS + _BESIDE_LAYER * manifest.num_layers, MAX_MODEL_BYTES)


def read_artifact(path: Path, artifact: pb.Artifact) -> bytes:
    """Reads a file of the bundle at `path`; raises BundleError if size or checksum differ from the manifest's."""
    file = path / artifact.file
    with _open(file) as opened:
        size = _size_of(opened)
        _require(size == artifact.size_bytes, file, f"{size} bytes, {artifact.size_bytes} in the manifest")
        content = opened.read(size)
    _check_digest(file, hashlib.sha256(content).hexdigest(), artifact)
    return content


def check_artifact(path: Path, artifact: pb.Artifact) -> None:
    """Verifies a file of the bundle at `path` as `read_artifact` does, without keeping its content."""
    file = path / artifact.file
    with _open(file) as opened:
        size = _size_of(opened)
        _require(size == artifact.size_bytes, file, f"{size} bytes, {artifact.size_bytes} in the manifest")
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    _check_digest(file, digest, artifact)


def _check_digest(file: Path, digest: str, artifact: pb.Artifact) -> None:
    _require(digest == artifact.sha256, file, f"sha256 {digest}, {artifact.sha256} in the manifest")


def _open(file: Path) -> io.BufferedReader:
    """Opens a regular file. Links are not followed, and pipes or devices do not block."""
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)
    try:
        opened = os.fdopen(os.open(file, flags), "rb")
    except FileNotFoundError:
        raise BundleError(f"{file}: no such file") from None
    except OSError as error:
        links = file.is_symlink() or not file.is_file()
        raise BundleError(f"{file}: {'not a regular file' if links else error.strerror}") from None
    if not stat.S_ISREG(os.fstat(opened.fileno()).st_mode):
        opened.close()
        raise BundleError(f"{file}: not a regular file")
    return opened


def _size_of(opened: io.BufferedReader) -> int:
    return os.fstat(opened.fileno()).st_size


def read_manifest(path: Path) -> pb.BundleManifest:
    """Reads and verifies the manifest of the bundle at `path`.

    Raises:
        BundleError: it is missing, not proto3 JSON of BundleManifest, of another format, or contradicts itself.
    """
    file = path / MANIFEST
    with _open(file) as opened:
        content = opened.read(MAX_MANIFEST_BYTES + 1)
    _require(len(content) <= MAX_MANIFEST_BYTES, file, f"more than {MAX_MANIFEST_BYTES} bytes")
    manifest = _parse(content, pb.BundleManifest(), file)
    _require(manifest.format == FORMAT, file, f"format {manifest.format}, {FORMAT} expected")
    check_name(manifest.name)
    _require(manifest.version > 0, file, "version is 0")
    try:
        check_model(manifest)
    except ValueError as error:
        raise BundleError(f"{file}: {error}") from None
    files = files_of(manifest)
    for kind, name in files.items():
        artifact = artifact_of(manifest, kind)
        _require(artifact.file == name, file, f"{artifact.file!r} given for {name}")
        limit = size_limit(manifest, kind)
        _require(artifact.size_bytes <= limit, file, f"{name}: {artifact.size_bytes} bytes, {limit} at most")
    _require(len(manifest.artifacts) == len(files), file, f"{len(files)} artifacts expected")
    return manifest


def fingerprint(manifest: pb.BundleManifest) -> bytes:
    """Returns the id of a version's content, as snapshots hold it: 16 bytes of the manifest's SHA-256."""
    return hashlib.sha256(manifest.SerializeToString(deterministic=True)).digest()[:16]


def check_model(manifest: pb.BundleManifest) -> None:
    """Checks the model that a manifest describes: sizes, labels, names, and the tensors of a step model.

    Raises:
        ValueError: it contradicts itself, or is over a limit.
    """
    sizes = {field: getattr(manifest, field) for field in MAX_SIZES}
    for field, size in sizes.items():
        _check(size <= MAX_SIZES[field], f"{field} {size}, {MAX_SIZES[field]} at most")
    labels, features = manifest.class_labels, manifest.feature_names
    if manifest.HasField("step"):
        step_model.check(manifest)
    else:
        for field, size in sizes.items():
            _check(size > 0, f"{field} is 0")
        classes = max(manifest.output_size, 2)
        _check(len(labels) == len(set(labels)) == classes, f"class_labels: {classes} distinct ones expected")
        _check(len(features) == manifest.input_size, f"feature_names: {manifest.input_size} of them expected")
    for field, texts in (("class_labels", labels), ("feature_names", features)):
        longest = max((len(text.encode()) for text in texts), default=0)
        _check(longest <= MOST_TEXT_BYTES, f"{field}: one of {longest} bytes, {MOST_TEXT_BYTES} at most")


def verify_bundle(path: Path) -> tuple[pb.BundleManifest, pb.ParityReport]:
    """Verifies the whole bundle at `path`: manifest, sizes, checksums, and that the proof covers these very files.

    Raises:
        BundleError: a check failed.
    """
    manifest = read_manifest(path)
    for artifact in manifest.artifacts:
        if artifact.kind != pb.ARTIFACT_KIND_PARITY:
            check_artifact(path, artifact)
    file = path / PARITY
    report = _parse(read_artifact(path, artifact_of(manifest, pb.ARTIFACT_KIND_PARITY)), pb.ParityReport(), file)
    _require(report.format in (1, PARITY_FORMAT), file, f"format {report.format}, {PARITY_FORMAT} expected")
    _require((report.name, report.version) == (manifest.name, manifest.version), file, "is another model's proof")
    if report.format == 1:
        problem = f"tolerance {report.tolerance}, at most {TOLERANCE} expected"
        _require(0 < report.tolerance <= TOLERANCE, file, problem)
    kinds = (pb.ARTIFACT_KIND_ONNX_STEP,) if manifest.HasField("step") else MODEL_KINDS
    for kind in kinds:
        runtimes = [proof.runtime for proof in report.proofs if proof.kind == kind]
        once = 0 < len(runtimes) == len(set(runtimes))
        _require(once, file, f"proofs of {files_of(manifest)[kind]} in {runtimes}, one for each runtime expected")
    for proof in report.proofs:
        _check_proof(proof, artifact_of(manifest, proof.kind), report, file)
    bitwise = any(proof.bitwise for proof in report.proofs)
    if manifest.HasField("step"):
        _require(bitwise == manifest.step.bitwise, file, f"step.bitwise is {manifest.step.bitwise}, the proof says not")
    else:
        _require(bitwise, file, "nothing is proven to the bit")
    return manifest, report


def _check_proof(proof: pb.ArtifactProof, artifact: pb.Artifact, report: pb.ParityReport, file: Path) -> None:
    _require(proof.sha256 == artifact.sha256, file, f"the proof of {artifact.file} is of another file")
    _require(len(proof.cases) > 0, file, f"the proof of {artifact.file} has no cases")
    for case in proof.cases:
        diff = case.max_abs_diff
        known = math.isfinite(diff) and diff >= 0
        if report.format == 1:
            passed = known and diff <= report.tolerance
            problem = f"differs from eager by {diff}, over {report.tolerance}"
        else:
            passed = known and 0 <= case.worst_ratio <= 1 and 0 <= case.bound < math.inf
            problem = f"is off from float64 by {case.worst_ratio} times its bound of {case.bound}"
        _require(passed, file, f"{artifact.file}: {case.name}: {problem}")
        same = not (proof.bitwise and case.bit_differences)
        _require(same, file, f"{artifact.file}: {case.name}: {case.bit_differences} values differ in their bits")
    # Servers report this number.
    largest = max(case.max_abs_diff for case in proof.cases)
    problem = f"{artifact.file}: max_abs_diff {proof.max_abs_diff}, its cases say {largest}"
    _require(proof.max_abs_diff == largest, file, problem)


def _parse(content: bytes, message: _MessageT, file: Path) -> _MessageT:
    try:
        return json_format.Parse(content, message)
    except (json_format.ParseError, ValueError, RecursionError) as error:
        raise BundleError(f"{file}: {str(error)[:500]}") from None


def _require(condition: bool, file: Path, problem: str) -> None:
    if not condition:
        raise BundleError(f"{file}: {problem}")


def _check(condition: bool, problem: str) -> None:
    if not condition:
        raise ValueError(problem)
