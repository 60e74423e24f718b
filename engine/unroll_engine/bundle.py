"""Bundles on disk: finds them in a model repository, verifies them, and reads their artifacts."""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from unroll_engine.models.spec import STATES, ModelKey, ModelSpec, StateTensor, StepSpec, Tensor
from unroll_proto import bundle, step_model
from unroll_proto.v1 import bundle_pb2

Fingerprint = tuple[tuple[int, ...] | None, ...]
"""Identity, size and times of a bundle's files; differs after a change. None for a missing file."""


@dataclass(frozen=True, slots=True)
class Found:
    """Contents of a model repository.

    Attributes:
        bundles: The version folders, each with its fingerprint.
        unreadable: Models whose folder could not be listed, with the reason; their versions are unknown.
        passed_over: Folders that can't be served, each with the reason.
    """

    bundles: dict[ModelKey, Fingerprint]
    unreadable: dict[str, str]
    passed_over: frozenset[str]


def find_bundles(root: Path) -> Found:
    """Lists the version folders under `root`.

    Raises:
        OSError: `root` can't be listed.
    """
    with os.scandir(root) as entries:
        names = sorted(entry.name for entry in entries if not entry.name.startswith("."))
    bundles: dict[ModelKey, Fingerprint] = {}
    unreadable: dict[str, str] = {}
    passed_over = set[str]()
    for name in names:
        try:
            keys = list(_versions(root, name))
        except (FileNotFoundError, NotADirectoryError):  # not a folder, or removed meanwhile
            continue
        except OSError as error:
            unreadable[name] = f"{str(root / name)!r} can't be read: {error.strerror}"
            continue
        for key in keys:
            problem = _unnamable(key)
            if problem:
                passed_over.add(f"{str(path_of(root, key))!r}: {problem}")
            else:
                bundles[key] = fingerprint(root, key)
    return Found(bundles, unreadable, frozenset(passed_over))


def fingerprint(root: Path, key: ModelKey) -> Fingerprint:
    """Returns the current fingerprint of a bundle."""
    folder = path_of(root, key)
    return tuple(_look_at(folder / name) for name in ("", bundle.MANIFEST, *bundle.FILES.values()))


def path_of(root: Path, key: ModelKey) -> Path:
    """Returns the folder of a version."""
    return root / key.name / str(key.version)


def _versions(root: Path, name: str) -> Iterator[ModelKey]:
    with os.scandir(root / name) as entries:
        folders = [entry.name for entry in entries if _is_folder(Path(entry))]
    for folder in folders:
        if folder.isascii() and folder.isdigit() and not folder.startswith("0"):
            yield ModelKey(name, int(folder))


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # a link that can't be followed: refused later, and the folders beside it are served
        return True


def _unnamable(key: ModelKey) -> str:
    """Returns the reason why logs, metrics and the index can't name such a version; empty if they can."""
    if not key.name.isprintable():
        return "the model's name has characters that can't be printed"
    if key.version > bundle.MAX_VERSION:
        return f"the version is over {bundle.MAX_VERSION}"
    return ""


def _look_at(path: Path) -> tuple[int, ...] | None:
    try:
        status = path.lstat()
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_mode, status.st_size, status.st_mtime_ns, status.st_ctime_ns


@dataclass(frozen=True, slots=True)
class VerifiedBundle:
    """A bundle whose checksums and proof hold.

    Attributes:
        path: Its folder.
        spec: Sizes, labels and names of its model.
        manifest: Its manifest.
        report: The proof of parity.
    """

    path: Path
    spec: ModelSpec
    manifest: bundle_pb2.BundleManifest
    report: bundle_pb2.ParityReport

    def read(self, kind: "bundle_pb2.ArtifactKind.ValueType") -> bytes:
        """Returns the content of an artifact and checks it again, since the file may have changed."""
        return bundle.read_artifact(self.path, bundle.artifact_of(self.manifest, kind))

    def max_abs_diff(self, kind: "bundle_pb2.ArtifactKind.ValueType") -> float:
        """Returns the artifact's largest absolute difference from eager PyTorch in any runtime, from the proof."""
        return max(proof.max_abs_diff for proof in self.report.proofs if proof.kind == kind)


def verify(root: Path, key: ModelKey) -> VerifiedBundle:
    """Verifies a version of the repository at `root`; only JSON is parsed.

    Raises:
        BundleError: layout, checksums or proof do not hold, the architecture is unknown, or the bundle lies outside
            `root`.
    """
    path = path_of(root, key)
    bundle.check_name(key.name)
    try:
        inside = path.resolve(strict=True).is_relative_to(root.resolve(strict=True))
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle
        raise bundle.BundleError(f"{path}: {error}") from None
    if not inside:
        raise bundle.BundleError(f"{path}: a link out of the repository")
    verified = verify_folder(path)
    if verified.spec.key != key:
        raise bundle.BundleError(f"{path}: the manifest says {verified.spec.key}")
    return verified


def verify_folder(path: Path) -> VerifiedBundle:
    """Verifies the bundle in a folder; only JSON is parsed.

    Raises:
        BundleError: layout, checksums or proof do not hold, or the architecture is unknown.
    """
    try:
        manifest, report = bundle.verify_bundle(path)
    except OSError as error:
        raise bundle.BundleError(f"{path}: {error}") from None
    step = _step_of(manifest.step) if manifest.HasField("step") else None
    if step is None and manifest.architecture not in STATES:
        raise bundle.BundleError(f"{path}: architecture {manifest.architecture!r} is not one of {', '.join(STATES)}")
    spec = ModelSpec(
        key=ModelKey(manifest.name, manifest.version),
        architecture=manifest.architecture,
        input_size=manifest.input_size,
        hidden_size=manifest.hidden_size,
        output_size=manifest.output_size,
        num_layers=manifest.num_layers,
        class_labels=tuple(manifest.class_labels),
        feature_names=tuple(manifest.feature_names),
        bundle=bundle.fingerprint(manifest),
        step=step,
    )
    return VerifiedBundle(path, spec, manifest, report)


def _step_of(step: bundle_pb2.StepModel) -> StepSpec:
    inputs, outputs = (
        tuple([Tensor(each.name, each.dims, each.dtype) for each in map(step_model.tensor_of, specs)])
        for specs in (step.inputs, step.outputs)
    )
    states = []
    for state in step.states:
        tensor = step_model.tensor_of(state.tensor)
        shape = math.prod(tensor.before), math.prod(tensor.after)
        initial = step_model.initial_of(state, tensor).reshape(shape) if state.initial else None
        states.append(StateTensor(tensor.name, shape, tensor.dtype, initial))
    return StepSpec(inputs, outputs, tuple(states), step.probabilities, step.form, step.source_sha256)


def folder_of(path: Path) -> Path:
    """Returns the bundle at a path, a model's newest version, or that of a repository's only model.

    Raises:
        BundleError: there is no bundle, or the repository has several models.
    """
    if (path / bundle.MANIFEST).exists():
        return path
    try:
        versions = [key.version for key in _versions(path, "")]
        keys = [] if versions else sorted(find_bundles(path).bundles)
    except OSError as error:
        raise bundle.BundleError(f"{path}: {error.strerror}") from None
    if versions:
        return path / str(max(versions))
    names = sorted({key.name for key in keys})
    if not names:
        raise bundle.BundleError(f"{path}: no bundle, no folder of versions (1, 2, ...), no folder of models")
    if len(names) > 1:
        raise bundle.BundleError(f"{path}: several models ({', '.join(names)}): name one, such as {path / names[0]}")
    return path_of(path, keys[-1])
