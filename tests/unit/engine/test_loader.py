"""Loading: verified bundles are loaded, and malicious files are refused even with matching checksums."""

import zipfile
from pathlib import Path

import onnx
import pytest
import torch
from support import bundles
from support.models import random_network

from unroll_engine.bundle import verify
from unroll_engine.errors import RuntimeUnavailableError
from unroll_engine.kernel import isas, read_onnx, unavailable_reason
from unroll_engine.models import loader
from unroll_engine.models.loader import Loader, Model
from unroll_engine.models.spec import ModelKey
from unroll_engine.runtimes import kernel
from unroll_export import SimpleRNN
from unroll_export.graphs.onnx_rnn import build_onnx_rnn
from unroll_proto.bundle import BundleError

KEY = ModelKey("m", 1)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bundles.export(random_network(layers=2), tmp_path_factory.mktemp("exported"))


@pytest.fixture
def bundle(exported: Path, tmp_path: Path) -> Path:
    return bundles.publish(exported, tmp_path, "m", 1)


def load(bundle: Path, runtime: str = "onnx", others: tuple[Model, ...] = ()) -> Model:
    return Loader(runtime, "cpu", 4).load(verify(bundle.parents[1], KEY), others)


def refused(bundle: Path, runtime: str = "onnx") -> str:
    with pytest.raises(BundleError) as caught:
        load(bundle, runtime)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("runtime", ["onnx", "torchscript"])
def test_a_good_bundle_is_loaded(bundle: Path, runtime: str) -> None:
    model = load(bundle, runtime)
    assert (model.spec.key, model.runtime.name, model.bitwise) == (KEY, runtime, runtime == "onnx")
    assert (model.runtime.variant, model.runtime_note) == ("", "")


def test_the_step_kernel_runs_what_it_can_unless_told_otherwise(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not unavailable_reason():
        model = load(bundle, "auto")
        assert (model.runtime.name, model.runtime.artifact, model.runtime_note) == ("kernel", "model.onnx", "")
        assert model.bitwise
        assert (model.runtime.variant, model.runtime_text) == (isas()[0], f"kernel ({isas()[0]})")
        assert load(bundle, "kernel").runtime.name == "kernel"
    monkeypatch.setattr(loader, "unavailable_reason", lambda: "no compiler")
    model = load(bundle, "auto")
    assert (model.runtime.name, model.runtime_note, model.bitwise) == ("onnx", "no compiler", True)
    assert model.runtime_text == "onnx (no compiler)"
    with pytest.raises(RuntimeUnavailableError, match=r"^runtime kernel: no compiler$"):
        load(bundle, "kernel")


@pytest.mark.skipif(unavailable_reason() is not None, reason="the kernel is not compiled")
def test_a_kernel_that_computes_something_else_is_not_served(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = random_network(layers=2, seed=1)
    monkeypatch.setattr(kernel, "read_onnx", lambda content: read_onnx(build_onnx_rnn(other)))
    model = load(bundle, "auto")
    assert model.runtime.name == "onnx"
    assert model.runtime_note.startswith("its logits differ from those of model.onnx by ")
    with pytest.raises(BundleError, match="kernel can't run it: its logits differ"):
        load(bundle, "kernel")


def test_the_same_sizes_are_measured_once(bundle: Path, exported: Path, tmp_path: Path) -> None:
    first = load(bundle)
    again = load(bundle, others=(first,))
    assert again.cost is first.cost


@pytest.mark.parametrize("runtime", ["auto", "onnx"])
def test_a_graph_of_other_operators_is_refused_though_all_checksums_fit(bundle: Path, runtime: str) -> None:
    model = onnx.load(bundle / "model.onnx")
    model.graph.node[-1].op_type = "Loop"
    (bundle / "model.onnx").write_bytes(model.SerializeToString())
    bundles.vouch(bundle, "model.onnx", proven=True)
    assert "model.onnx: node 'logits' (Loop): no such operator" in refused(bundle, runtime)


def test_what_is_no_graph_is_refused_though_all_checksums_fit(bundle: Path) -> None:
    (bundle / "model.onnx").write_bytes(b"\xff" * 100)
    bundles.vouch(bundle, "model.onnx", proven=True)
    assert "model.onnx: not an ONNX model" in refused(bundle)


@pytest.mark.parametrize("sizes", [(4, 8, 4, 2), (3, 9, 4, 2), (3, 8, 5, 2), (3, 8, 4, 3), (3, 8, 4, 1)])
def test_a_network_of_other_sizes_than_the_manifest_says_is_refused(
    bundle: Path, sizes: tuple[int, int, int, int]
) -> None:
    assert "which is not what the manifest says" in refused(spoilt(bundle, random_network(*sizes)))


def test_a_bundle_of_before_is_loaded(bundle: Path) -> None:
    """Old bundles had a second graph, proven bit for bit, and a proof of `model.onnx` within a tolerance."""
    bundles.make_old(bundle)
    assert (bundle / "model.scan.onnx").exists()
    model = load(bundle, "auto")
    assert model.bitwise
    assert model.runtime.artifact == "model.onnx"
    (bundle / "model.scan.onnx").write_bytes(b"changed")
    with pytest.raises(BundleError, match=r"model\.scan\.onnx"):
        load(bundle)


def test_an_archive_that_unpacks_to_much_more_is_refused(bundle: Path) -> None:
    with zipfile.ZipFile(bundle / "model.ts", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * 2**25)
    bundles.vouch(bundle, "model.ts", proven=True)
    assert (bundle / "model.ts").stat().st_size < 2**16
    assert "model.ts: unpacks to 33554432 bytes" in refused(bundle, "torchscript")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"PK\x05\x06" + b"\xff" * 18])
def test_what_is_no_archive_is_refused(bundle: Path, content: bytes) -> None:
    (bundle / "model.ts").write_bytes(content)
    bundles.vouch(bundle, "model.ts", proven=True)
    assert "model.ts: " in refused(bundle, "torchscript")


def test_what_changes_after_it_was_verified_is_not_loaded(bundle: Path) -> None:
    verified = verify(bundle.parents[1], KEY)
    file = bundle / "model.onnx"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(BundleError, match="sha256"):
        Loader("onnx", "cpu", 4).load(verified)


def spoilt(bundle: Path, network: SimpleRNN) -> Path:
    """Puts another network of the same sizes into a bundle, with matching checksums and proof."""
    (bundle / "model.onnx").write_bytes(build_onnx_rnn(network))
    bundles.vouch(bundle, "model.onnx", proven=True)
    return bundle


@pytest.mark.parametrize("divisor", [0.0, -1.0])
def test_a_deviation_that_is_not_positive_is_refused(bundle: Path, divisor: float) -> None:
    network = random_network(layers=2)
    network.std[1] = divisor
    assert "model.onnx: std: has values that are not positive" in refused(spoilt(bundle, network))


def test_a_model_whose_answers_are_not_finite_is_refused(bundle: Path) -> None:
    network = random_network(layers=2)
    torch.nn.init.constant_(network.fc.weight, 3e38)
    torch.nn.init.constant_(network.fc.bias, 3e38)
    assert "model.onnx gives logits: has values that are not finite" in refused(spoilt(bundle, network))


class Narrow(torch.nn.Module):
    """A network that returns states of half their width."""

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: torch.Tensor, initial: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits, states, final = self.network(x, initial)
        return logits, states[:, :, ::2], final


@pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated:DeprecationWarning")
def test_torchscript_that_gives_other_shapes_is_refused(bundle: Path) -> None:
    network = torch.jit.load(str(bundle / "model.ts"))  # type: ignore[no-untyped-call]
    example = (torch.zeros(1, 2, 3), torch.zeros(2, 1, 8))
    torch.jit.trace(Narrow(network), example).save(str(bundle / "model.ts"))  # type: ignore[no-untyped-call]
    bundles.vouch(bundle, "model.ts", proven=True)
    assert "model.ts gives states: float32 [2, 3, 4], float32 [2, 3, 8] expected" in refused(bundle, "torchscript")
