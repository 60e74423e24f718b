"""Export of a run: manifest, proof, versions, refusals."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.exports import run_of
from support.models import random_network

from unroll_export import SimpleRNN, exporting
from unroll_export.bundle_writer import Draft
from unroll_export.exporting import BUILDERS, Exported, Kind, export_run
from unroll_export.parity.cases import PLANS
from unroll_export.parity.probes import PROBES
from unroll_export.parity.runners import ParityError
from unroll_export.runs import RunError
from unroll_proto import bundle
from unroll_proto.v1 import bundle_pb2 as pb


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return export_run(run_of(random_network(3, 8, 1, 2)), tmp_path_factory.mktemp("models") / "made-up")


def test_holds_every_file_and_nothing_else(exported: Exported) -> None:
    assert exported.path.name == "1"
    names = {path.name for path in exported.path.iterdir()}
    assert names == {bundle.MANIFEST, *bundle.FILES.values()}
    assert [path.name for path in exported.path.parent.iterdir()] == ["1"]


def test_the_manifest_says_everything(exported: Exported) -> None:
    manifest, _ = bundle.verify_bundle(exported.path)
    assert (manifest.name, manifest.version, manifest.architecture) == ("made-up", 1, "simple_rnn")
    sizes = (manifest.input_size, manifest.hidden_size, manifest.output_size, manifest.num_layers)
    assert sizes == (3, 8, 1, 2)
    assert list(manifest.class_labels) == ["class 0", "class 1"]
    assert list(manifest.feature_names) == ["feature 0", "feature 1", "feature 2"]
    assert manifest.created.seconds > 1_700_000_000
    assert manifest.libraries["torch"] == torch.__version__
    assert {"python", "onnx", "onnxruntime", "numpy", "unroll-export"} <= set(manifest.libraries)
    assert manifest.training == pb.TrainingSummary(
        data="made-up.npz",
        data_sha256="ab" * 32,
        seed=7,
        epochs=3,
        training_sequences=11,
        longest_sequence=20,
        test_accuracy=0.75,
    )
    tensors = {
        artifact.file: [(spec.name, tuple(spec.shape)) for spec in (*artifact.inputs, *artifact.outputs)]
        for artifact in manifest.artifacts
    }
    state = ("2", "batch", "8")
    assert tensors[bundle.ONNX_RNN] == [
        ("input", ("batch", "time", "3")),
        ("initial_state", state),
        ("logits", ("batch", "time", "1")),
        ("states", ("batch", "time", "8")),
        ("final_state", state),
    ]
    assert tensors[bundle.TORCHSCRIPT] == tensors[bundle.ONNX_RNN]
    assert tensors[bundle.WEIGHTS] == tensors[bundle.PARITY] == []


def test_the_proof_holds_every_case(exported: Exported) -> None:
    _, report = bundle.verify_bundle(exported.path)
    assert report.format == bundle.PARITY_FORMAT
    assert report.cpu
    assert report.libraries["onnxruntime"]
    for proof in report.proofs:
        assert [case.name for case in proof.cases] == [*PROBES, *(plan.name for plan in PLANS)]
        assert proof.sha256 == bundle.sha256_of(exported.path / proof.file)


def test_a_run_without_a_test_split_has_no_accuracy(tmp_path: Path) -> None:
    run = run_of(random_network(1, 1, 2), test_accuracy=None)
    manifest, _ = bundle.verify_bundle(export_run(run, tmp_path / "jv").path)
    assert not manifest.training.HasField("test_accuracy")


def test_the_same_run_gives_the_same_files(exported: Exported) -> None:
    again = export_run(run_of(random_network(3, 8, 1, 2)), exported.path.parent)
    assert again.path.name == "2"
    for kind, file in bundle.FILES.items():
        # torch renames the types of a second TorchScript of a process; see test_torchscript.
        if kind not in (pb.ARTIFACT_KIND_PARITY, pb.ARTIFACT_KIND_TORCHSCRIPT):
            assert (again.path / file).read_bytes() == (exported.path / file).read_bytes()


def test_a_version_taken_meanwhile_is_left_and_the_next_one_says_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Overtaken(Draft):
        def publish(self, version: int) -> Path:
            if version < 3:
                (tmp_path / "jv" / str(version)).mkdir()
                (tmp_path / "jv" / str(version) / "theirs").touch()
            return super().publish(version)

    monkeypatch.setattr(exporting, "Draft", Overtaken)
    path = export_run(run_of(random_network(1, 1, 1)), tmp_path / "jv").path
    assert path == tmp_path / "jv" / "3"
    manifest, report = bundle.verify_bundle(path)
    assert manifest.version == report.version == 3
    for version in ("1", "2"):
        assert [file.name for file in (tmp_path / "jv" / version).iterdir()] == ["theirs"]


@pytest.mark.parametrize("kind", BUILDERS, ids=bundle.FILES.get)
def test_a_wrong_artifact_is_refused_and_nothing_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Kind
) -> None:
    build = BUILDERS[kind]

    def build_wrong(network: SimpleRNN) -> bytes:
        changed = random_network()
        changed.load_state_dict(network.state_dict())
        changed.state_dict()["rnn.weight_hh_l0"][0, 0] += 1e-3
        return build(changed)

    monkeypatch.setitem(BUILDERS, kind, build_wrong)
    with pytest.raises(ParityError, match=rf"^{bundle.FILES[kind]} \(\w+\): case '.*': is off from float64 by"):
        export_run(run_of(random_network()), tmp_path / "models" / "jv")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", [".hidden", "with space", "x" * 65, "ü"])
def test_a_bad_name_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(bundle.BundleError, match="model name"):
        export_run(run_of(random_network()), tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_a_version_is_no_model_folder(exported: Exported) -> None:
    with pytest.raises(bundle.BundleError, match="is a version of a bundle"):
        export_run(run_of(random_network()), exported.path)


def test_what_a_server_would_refuse_is_not_written(tmp_path: Path) -> None:
    run = run_of(random_network(1, 1, 2), class_labels=["same", "same"])
    with pytest.raises(bundle.BundleError, match="class_labels"):
        export_run(run, tmp_path / "jv")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("changes", [{"longest_sequence": "many"}, {"seed": -1}, {"data": None}])
def test_a_summary_that_says_too_little_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(RunError, match=r"^summary\.json: missing or of the wrong type"):
        export_run(run_of(random_network(), **changes), tmp_path / "jv")
    assert list(tmp_path.iterdir()) == []
