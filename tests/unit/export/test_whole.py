"""Networks that look at more than the past are served for whole sequences, with proof; streams are refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file
from support.modules import CLASSES, FEATURES
from support.step_graphs import source
from support.torch_graphs import exported
from torch import Tensor, nn

from unroll_engine import Engine
from unroll_engine.errors import InvalidRequestError
from unroll_export import export
from unroll_export.bidirectional import READOUTS, BidirectionalClassifier, Readout
from unroll_export.export_cli import group
from unroll_export.importing import import_bidirectional, import_weights
from unroll_export.parity.runners import ParityError
from unroll_export.verifying import verify
from unroll_export.weight_files import ImportRefusedError, Samples
from unroll_export.whole import import_whole
from unroll_proto.bundle import verify_bundle

LABELS = ["a", "b", "c"]
LENGTHS = (1, 9, 2, 40, 7)


class Attention(nn.Module):
    """A bidirectional layer, and attention over its time; scores of a sequence, and of each step."""

    def __init__(self, kind: type[nn.RNNBase], batch_first: bool = True, bidirectional: bool = True) -> None:
        super().__init__()
        self.recurrent = kind(FEATURES, 6, 2, batch_first=batch_first, bidirectional=bidirectional)  # type: ignore[arg-type]
        width = 12 if bidirectional else 6
        self.score, self.readout = nn.Linear(width, 1), nn.Linear(width, CLASSES)
        self.time = 1 if batch_first else 0

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        states, _ = self.recurrent(x)
        weights = self.score(states).softmax(self.time)
        return {"steps": states, "scores": self.readout((weights * states).sum(self.time))}


def sequences() -> list[np.ndarray[Any, np.dtype[np.float32]]]:
    rng = np.random.default_rng(0)
    return [rng.standard_normal((length, FEATURES)).astype(np.float32) for length in LENGTHS]


def known(module: nn.Module, values: np.ndarray[Any, Any], batch_first: bool = True) -> np.ndarray[Any, Any]:
    x = torch.from_numpy(values)
    with torch.no_grad():
        found = module.eval()(x[None] if batch_first else x[:, None])
    scores: np.ndarray[Any, Any] = (found["scores"] if isinstance(found, dict) else found).numpy()[0]
    return scores


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
def test_bidirectional_modules_classify_whole_sequences(
    tmp_path: Path, kind: type[nn.RNNBase], batch_first: bool
) -> None:
    torch.manual_seed(0)
    network = Attention(kind, batch_first)
    path = export(network, name="m", example=torch.randn(8, 8, FEATURES), labels=LABELS, models=tmp_path)
    manifest, report = verify_bundle(path)
    assert (manifest.architecture, manifest.step.form, manifest.step.bitwise) == ("whole", "whole", True)
    assert [each.name for each in manifest.step.outputs] == ["scores"]
    cases = [case.name for case in report.proofs[0].cases]
    assert cases == ["eager PyTorch", "eager PyTorch in float64", "each sequence again, after others"]
    assert verify(path).proofs[0].bitwise
    values = sequences()
    with Engine.load(path) as engine:
        together = engine.classify(values)
        for index, own in enumerate(values):
            alone = engine.classify([own])
            assert alone.logits.tobytes() == together.logits[index].tobytes()
            np.testing.assert_allclose(alone.logits[0], known(network, own, batch_first), rtol=1e-4, atol=1e-5)
        for ask in (engine.open, lambda: engine.classify(values, return_final_states=True)):
            with pytest.raises(InvalidRequestError, match="m/1 takes whole sequences only, since it looks at more"):
                ask()


def test_modules_that_pool_are_offered_whole_sequences(tmp_path: Path) -> None:
    network = Attention(nn.GRU, bidirectional=False)
    options: dict[str, Any] = {"name": "m", "example": torch.randn(2, 8, FEATURES), "models": tmp_path}
    with pytest.raises(ParityError, match="whole=True, serves it for whole sequences only"):
        export(network, **options)
    path = export(network, **options, labels=LABELS, whole=True)
    with Engine.load(path) as engine:
        values = sequences()[3]
        np.testing.assert_allclose(engine.classify([values]).logits[0], known(network, values), rtol=1e-4, atol=1e-5)


def test_a_value_for_each_step_alone_is_refused(tmp_path: Path) -> None:
    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.recurrent = nn.GRU(FEATURES, 3, bidirectional=True, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            states: Tensor = self.recurrent(x)[0]
            return states

    with pytest.raises(ImportRefusedError, match="output 'output': has a value for each step"):
        export(Tagger(), name="m", example=torch.randn(2, 8, FEATURES), models=tmp_path)
    assert not (tmp_path / "m").exists()


def classifier(kind: type[nn.RNN | nn.LSTM | nn.GRU], readout: Readout, **options: Any) -> BidirectionalClassifier:
    torch.manual_seed(0)
    return BidirectionalClassifier(kind(FEATURES, 5, 2, **options), CLASSES, readout).eval()


@pytest.mark.parametrize("readout", READOUTS)
@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
def test_samples_tell_what_the_readout_of_both_directions_takes(
    kind: type[nn.RNN | nn.LSTM | nn.GRU], readout: Readout
) -> None:
    network = classifier(kind, readout, **({"nonlinearity": "relu"} if kind is nn.RNN else {}))
    x = torch.randn(3, 8, FEATURES)
    with torch.no_grad():
        outputs = network(x)
        found = import_bidirectional(network.state_dict(), samples=Samples(x, outputs.double()))
        torch.testing.assert_close(found(x), outputs)
        other: Readout = "mean" if readout != "mean" else "last"
        with pytest.raises(ImportRefusedError, match="--samples: the network gives other outputs"):
            import_bidirectional(network.state_dict(), readout=other, samples=Samples(x, outputs.double()))


def test_weights_of_both_directions_need_a_readout() -> None:
    weights = classifier(nn.GRU, "last").state_dict()
    with pytest.raises(ImportRefusedError, match="--readout: required for a bidirectional network, one of last, final"):
        import_bidirectional(weights)
    with pytest.raises(ImportRefusedError, match="import_bidirectional takes it"):
        import_weights(weights)
    with pytest.raises(ImportRefusedError, match=r"no readout: one matrix \[outputs, 10\] is expected"):
        import_bidirectional({k: v for k, v in weights.items() if not k.startswith("fc")}, readout="last")


def test_the_command_imports_weights_and_graphs_of_both_directions(tmp_path: Path) -> None:
    network = classifier(nn.LSTM, "final")
    save_file(dict(network.state_dict()), tmp_path / "net.safetensors")
    (tmp_path / "graph.onnx").write_bytes(exported(network, (2, 5, FEATURES), True, 17))
    labels = tmp_path / "labels.txt"
    labels.write_text("\n".join(LABELS))
    run = CliRunner()
    report = run.invoke(group, ["inspect", str(tmp_path / "graph.onnx")]).output
    assert "a model of whole sequences, as it is bidirectional" in report
    values = sequences()
    for file, flags in (("net.safetensors", ["--readout", "final"]), ("graph.onnx", [])):
        out = tmp_path / "models" / file.partition(".")[0]
        done = run.invoke(group, ["import", str(tmp_path / file), "--out", str(out), "--labels", str(labels), *flags])
        assert done.exit_code == 0, done.output
        assert "for whole sequences only" in done.output
        manifest, _ = verify_bundle(out / "1")
        assert (manifest.step.source, list(manifest.class_labels)) == (file, LABELS)
        with Engine.load(out) as engine:
            logits = engine.classify(values).logits
            np.testing.assert_allclose(logits, [known(network, own) for own in values], rtol=1e-4, atol=1e-5)


def test_a_graph_of_a_fixed_time_is_refused_for_whole_sequences(tmp_path: Path) -> None:
    content = exported(classifier(nn.GRU, "mean"), (1, 5, FEATURES), False, 17)
    with pytest.raises(ImportRefusedError, match="time is fixed at 5; export the model with a dynamic time"):
        import_whole(source(content), tmp_path / "m")
