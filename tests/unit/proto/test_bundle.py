"""Bundles: a valid one is read, and any change is found and named."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from unroll_proto.bundle import BundleError, check_name, read_manifest, sha256_of, verify_bundle


@pytest.fixture
def bundle(bundle_root: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(bundle_root / "jv" / "1", tmp_path / "jv" / "1"))


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def vouch(bundle: Path, name: str) -> None:
    """Updates the manifest's size and checksum of a file."""

    def change(manifest: dict[str, Any]) -> None:
        artifact = next(artifact for artifact in manifest["artifacts"] if artifact["file"] == name)
        artifact.update(sha256=sha256_of(bundle / name), sizeBytes=str((bundle / name).stat().st_size))

    edit(bundle / "manifest.json", change)


def edit_proof(bundle: Path, change: Callable[[dict[str, Any]], None]) -> None:
    edit(bundle / "parity.json", change)
    vouch(bundle, "parity.json")


def onnx_proof(report: dict[str, Any]) -> dict[str, Any]:
    proof: dict[str, Any] = next(proof for proof in report["proofs"] if proof["runtime"] == "scan")
    return proof


def test_a_good_bundle_verifies(bundle: Path) -> None:
    manifest, report = verify_bundle(bundle)
    assert (manifest.name, manifest.version) == ("jv", 1) == (report.name, report.version)
    assert {proof.file for proof in report.proofs} == {"model.onnx", "model.ts"}


@pytest.mark.parametrize("name", ["model.onnx", "model.ts", "weights.safetensors", "parity.json", "manifest.json"])
def test_a_missing_file_is_named(bundle: Path, name: str) -> None:
    (bundle / name).unlink()
    with pytest.raises(BundleError, match=name):
        verify_bundle(bundle)


@pytest.mark.parametrize("name", ["model.onnx", "model.ts", "weights.safetensors", "parity.json"])
def test_one_changed_byte_is_found(bundle: Path, name: str) -> None:
    content = bytearray((bundle / name).read_bytes())
    content[len(content) // 2] ^= 1
    (bundle / name).write_bytes(content)
    with pytest.raises(BundleError, match=rf"{name}: sha256 \w+, \w+ in the manifest"):
        verify_bundle(bundle)


def test_a_longer_file_is_found_by_its_size(bundle: Path) -> None:
    with (bundle / "model.onnx").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(BundleError, match=r"model.onnx: \d+ bytes, \d+ in the manifest"):
        verify_bundle(bundle)


def test_a_link_out_of_the_bundle_is_not_followed(bundle: Path, tmp_path: Path) -> None:
    (bundle / "model.onnx").rename(tmp_path / "elsewhere")
    (bundle / "model.onnx").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BundleError, match="not a regular file"):
        verify_bundle(bundle)


def test_a_changed_model_is_not_what_was_proven_even_if_the_manifest_vouches(bundle: Path) -> None:
    with (bundle / "model.onnx").open("ab") as file:
        file.write(b"\0")
    vouch(bundle, "model.onnx")
    with pytest.raises(BundleError, match=r"the proof of model\.onnx is of another file"):
        verify_bundle(bundle)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda report: onnx_proof(report)["cases"][0].update(worstRatio=1.1), "is off from float64 by 1.1 times"),
        (lambda report: onnx_proof(report)["cases"][0].update(worstRatio="NaN"), "is off from float64 by nan times"),
        (lambda report: onnx_proof(report)["cases"][-1].update(bitDifferences="1"), "1 values differ in their bits"),
        (lambda report: onnx_proof(report).update(cases=[]), "has no cases"),
        (lambda report: onnx_proof(report).update(maxAbsDiff=0.5), "max_abs_diff 0.5, its cases say"),
        (lambda report: [proof.update(bitwise=False) for proof in report["proofs"]], "nothing is proven to the bit"),
        (lambda report: report["proofs"].pop(), r"proofs of model\.ts in \[\], one for each runtime"),
        (lambda report: report["proofs"].append(report["proofs"][0]), r"proofs of model\.onnx in \['onnx', "),
        (lambda report: report.update(format=1, tolerance=1e-3), "tolerance 0.001"),
        (lambda report: report.update(version=2), "another model's proof"),
        (lambda report: report.update(format=3), "format 3, 2 expected"),
    ],
)
def test_a_proof_that_does_not_hold_is_refused(
    bundle: Path, change: Callable[[dict[str, Any]], None], says: str
) -> None:
    edit_proof(bundle, change)
    with pytest.raises(BundleError, match=says):
        verify_bundle(bundle)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda manifest: manifest.update(format=2), "format 2, 1 expected"),
        (lambda manifest: manifest.update(surprise=1), "surprise"),
        (lambda manifest: manifest.update(name="../up"), "model name '../up'"),
        (lambda manifest: manifest.update(hiddenSize=0), "hidden_size is 0"),
        (lambda manifest: manifest["classLabels"].pop(), "class_labels: 9 distinct"),
        (lambda manifest: manifest["featureNames"].pop(), "feature_names: 12"),
        (lambda manifest: manifest["artifacts"][0].update(file="../../secret"), "'../../secret' given for"),
        (lambda manifest: manifest["artifacts"].pop(), "0 artifacts of kind"),
        (lambda manifest: manifest["artifacts"].append(manifest["artifacts"][0]), "2 artifacts of kind"),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(
    bundle: Path, change: Callable[[dict[str, Any]], None], says: str
) -> None:
    edit(bundle / "manifest.json", change)
    with pytest.raises(BundleError, match=says):
        read_manifest(bundle)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[]"])
def test_a_manifest_that_is_no_json_object_is_refused_in_one_line(bundle: Path, content: bytes) -> None:
    (bundle / "manifest.json").write_bytes(content)
    with pytest.raises(BundleError, match=r"manifest\.json") as caught:
        read_manifest(bundle)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["", ".", "-a", "a/b", "a b", "é", "a" * 65])
def test_a_bad_model_name_is_refused(name: str) -> None:
    with pytest.raises(BundleError, match="model name"):
        check_name(name)
