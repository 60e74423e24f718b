"""Repeated proofs of a bundle: only the files count, not the manifest or the old proof."""

import shutil
from pathlib import Path

import pytest
from google.protobuf import json_format
from safetensors.torch import load_file, save
from support.exports import run_of
from support.models import random_network

from unroll_export.exporting import BUILDERS, Kind, export_run
from unroll_export.parity.gate import CASES
from unroll_export.parity.runners import ParityError
from unroll_export.verifying import verify
from unroll_proto import bundle
from unroll_proto.v1 import bundle_pb2 as pb


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_run(run_of(random_network()), tmp_path_factory.mktemp("models") / "jv").path


@pytest.fixture
def copied(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "copy"))


def vouch(path: Path, manifest: pb.BundleManifest) -> None:
    """Makes checksums and proof match the files, as a forger would."""
    report = json_format.Parse((path / bundle.PARITY).read_bytes(), pb.ParityReport())
    for proof in report.proofs:
        proof.sha256 = bundle.sha256_of(path / proof.file)
    (path / bundle.PARITY).write_text(bundle.to_json(report), encoding="utf-8")
    for artifact in manifest.artifacts:
        artifact.sha256 = bundle.sha256_of(path / artifact.file)
        artifact.size_bytes = (path / artifact.file).stat().st_size
    (path / bundle.MANIFEST).write_text(bundle.to_json(manifest), encoding="utf-8")


def test_runs_every_case_again(exported: Path) -> None:
    seen: list[str] = []
    proven = verify(exported, seen.append)
    assert len(seen) == CASES
    _, report = bundle.verify_bundle(exported)
    assert [proof.sha256 for proof in proven.proofs] == [proof.sha256 for proof in report.proofs]


@pytest.mark.parametrize("file", bundle.FILES.values())
def test_a_file_that_changed_is_found(copied: Path, file: str) -> None:
    content = bytearray((copied / file).read_bytes())
    content[len(content) // 2] ^= 1
    (copied / file).write_bytes(content)
    with pytest.raises(bundle.BundleError, match="sha256"):
        verify(copied)


@pytest.mark.parametrize("kind", BUILDERS, ids=bundle.FILES.get)
def test_an_artifact_of_other_weights_is_found_though_vouched_for(copied: Path, kind: Kind) -> None:
    other = random_network()
    other.state_dict()["fc.weight"][0, 0] += 1e-3
    (copied / bundle.FILES[kind]).write_bytes(BUILDERS[kind](other))
    vouch(copied, bundle.read_manifest(copied))
    bundle.verify_bundle(copied)
    with pytest.raises(ParityError, match=rf"^{bundle.FILES[kind]} \(\w+\): case"):
        verify(copied)


def test_weights_of_other_sizes_are_found(copied: Path) -> None:
    manifest = bundle.read_manifest(copied)
    manifest.hidden_size = 9
    vouch(copied, manifest)
    with pytest.raises(bundle.BundleError, match="names, types or shapes"):
        verify(copied)
    manifest.hidden_size, manifest.num_layers = 8, 256
    vouch(copied, manifest)
    with pytest.raises(bundle.BundleError, match=r"8 tensors don't make 256 layers"):
        verify(copied)


def test_weights_of_another_type_are_found(copied: Path) -> None:
    weights = load_file(copied / bundle.WEIGHTS)
    (copied / bundle.WEIGHTS).write_bytes(save({name: value.double() for name, value in weights.items()}))
    vouch(copied, bundle.read_manifest(copied))
    with pytest.raises(bundle.BundleError, match="names, types or shapes"):
        verify(copied)


def test_weights_that_are_none_are_found(copied: Path) -> None:
    (copied / bundle.WEIGHTS).write_bytes(b"nothing of the sort")
    vouch(copied, bundle.read_manifest(copied))
    with pytest.raises(bundle.BundleError, match="not readable as safetensors"):
        verify(copied)


def test_tensors_that_the_sizes_contradict_are_found(copied: Path) -> None:
    manifest = bundle.read_manifest(copied)
    bundle.artifact_of(manifest, pb.ARTIFACT_KIND_ONNX_RNN).inputs[0].shape[0] = "time"
    vouch(copied, manifest)
    with pytest.raises(bundle.BundleError, match=r"model\.onnx has other tensors"):
        verify(copied)


def test_an_unknown_architecture_is_refused(copied: Path) -> None:
    manifest = bundle.read_manifest(copied)
    manifest.architecture = "lstm"
    vouch(copied, manifest)
    with pytest.raises(bundle.BundleError, match="'lstm' is not known"):
        verify(copied)
