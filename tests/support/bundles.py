"""Bundles for tests: exported, then renumbered, with matching checksums."""

import json
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from support.exports import run_of
from unroll_export.exporting import export_run
from unroll_export.model import RecurrentClassifier
from unroll_proto.bundle import sha256_of


def export(network: RecurrentClassifier[Any], root: Path, name: str = "m") -> Path:
    """Exports a network as the next version of a model; returns the version's folder."""
    return export_run(run_of(network), root / name).path


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Changes a JSON file."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def vouch(bundle: Path, name: str, proven: bool = False) -> None:
    """Updates the manifest's size and checksum of a file; with `proven` also the proof's."""
    digest = sha256_of(bundle / name)

    def describe(manifest: dict[str, Any]) -> None:
        artifact = next(artifact for artifact in manifest["artifacts"] if artifact["file"] == name)
        artifact.update(sha256=digest, sizeBytes=str((bundle / name).stat().st_size))

    def prove(report: dict[str, Any]) -> None:
        for proof in report["proofs"]:
            if proof["file"] == name:
                proof.update(sha256=digest)

    if proven:
        edit(bundle / "parity.json", prove)
        vouch(bundle, "parity.json")
    edit(bundle / "manifest.json", describe)


def make_old(bundle: Path) -> None:
    """Converts a bundle to the old form: with `model.scan.onnx`, which alone was proven bit for bit."""
    name, kind = "model.scan.onnx", "ARTIFACT_KIND_ONNX_SCAN"
    (bundle / name).write_bytes(b"nothing reads it")

    def describe(manifest: dict[str, Any]) -> None:
        manifest["artifacts"].append({"kind": kind, "file": name})

    def prove(report: dict[str, Any]) -> None:
        report["proofs"] = [proof for proof in report["proofs"] if not proof["bitwise"]]
        report["proofs"].append(report["proofs"][0] | {"kind": kind, "file": name, "bitwise": True})

    edit(bundle / "parity.json", prove)
    edit(bundle / "manifest.json", describe)
    vouch(bundle, name, proven=True)


def publish(
    bundle: Path, root: Path, name: str, version: int, spoil: Callable[[Path], object] = lambda _: None
) -> Path:
    """Publishes a copy of a bundle in a repository, in one step, with another name and version.

    Args:
        bundle: The version folder to copy.
        root: The repository.
        name: The model's new name.
        version: The new version; replaces an existing one.
        spoil: Changes the copy before it is published.
    """
    target = root / name / str(version)
    draft = target.parent / f".tmp-{secrets.token_hex(4)}"
    shutil.copytree(bundle, draft)
    for file in ("parity.json", "manifest.json"):
        edit(draft / file, lambda content: content.update(name=name, version=version))
    vouch(draft, "parity.json")
    spoil(draft)
    old = _set_aside(target)
    draft.rename(target)
    shutil.rmtree(old, ignore_errors=True)
    return target


def withdraw(version: Path) -> None:
    """Removes a version from its repository, in one step."""
    shutil.rmtree(_set_aside(version), ignore_errors=True)


def _set_aside(version: Path) -> Path:
    away = version.parent / f".tmp-{secrets.token_hex(4)}"
    if version.exists():
        version.rename(away)
    return away
