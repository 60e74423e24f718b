"""`unroll-export import`: networks are rebuilt from the tensors of torch's modules, others refused with the reason."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from support.processes import run
from torch import Tensor, nn

from unroll_export.importing import import_weights, imported_run
from unroll_export.model import Nonlinearity, SimpleRNN
from unroll_export.weight_files import ImportRefusedError, Samples, read_samples, read_weights
from unroll_proto.bundle import verify_bundle


class Tagger(nn.Module):
    """A user's network with its own names."""

    def __init__(self, layer: nn.RNNBase, outputs: int = 3, bias: bool = True, last: bool = True) -> None:
        super().__init__()
        self.encoder = layer
        self.head = nn.Linear(layer.hidden_size, outputs, bias=bias)
        self.last = last

    def forward(self, x: Tensor) -> Tensor:
        states, _ = self.encoder(x)
        time_axis = 1 if self.encoder.batch_first else 0
        logits: Tensor = self.head(states.select(time_axis, -1) if self.last else states)
        return logits


def tagger(kind: type[nn.RNN | nn.LSTM | nn.GRU] = nn.RNN, **settings: Any) -> Tagger:
    torch.manual_seed(0)
    return Tagger(kind(4, 6, **({"batch_first": True} | settings))).eval()


@settings(max_examples=30)
@given(data=st.data())
def test_a_module_of_any_cell_and_shape_is_found_again(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from([nn.RNN, nn.LSTM, nn.GRU]))
    layers = data.draw(st.integers(1, 3))
    nonlinearity: Nonlinearity = data.draw(st.sampled_from(["tanh", "relu"])) if kind is nn.RNN else "tanh"
    extra: dict[str, Any] = {"nonlinearity": nonlinearity} if kind is nn.RNN else {}
    batch_first = data.draw(st.booleans())
    layer = kind(
        data.draw(st.integers(1, 5)),
        data.draw(st.integers(1, 7)),
        layers,
        bias=data.draw(st.booleans()),
        batch_first=batch_first,
        dropout=0.5 if layers > 1 else 0.0,
        **extra,
    )
    module = Tagger(layer, data.draw(st.integers(1, 4)), data.draw(st.booleans()), data.draw(st.booleans()))
    x = torch.randn(2, 5, layer.input_size)
    model = import_weights(module.state_dict(), nonlinearity=nonlinearity)
    with torch.no_grad():
        expected = module.eval()(x if batch_first else x.transpose(0, 1))
        logits = model.unroll(x)[0]
    if module.last:
        logits = logits[:, -1]
    elif not batch_first:
        expected = expected.transpose(0, 1)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


def test_samples_tell_relu_from_tanh_and_refuse_another_network() -> None:
    module = tagger(nonlinearity="relu")
    x = torch.randn(3, 8, 4)
    with torch.no_grad():
        logits = module(x).double()
    for outputs in (logits, logits.softmax(-1)):
        model = import_weights(module.state_dict(), samples=Samples(x, outputs))
        assert model.rnn.nonlinearity == "relu"
    with pytest.raises(ImportRefusedError, match=r"--samples: the network gives other outputs \(off by 0\."):
        import_weights(module.state_dict(), nonlinearity="tanh", samples=Samples(x, logits))
    with pytest.raises(ImportRefusedError, match=r"--samples: the network gives other outputs"):
        import_weights(module.state_dict(), samples=Samples(x, logits), mean=np.ones(4, np.float32))
    with pytest.raises(ImportRefusedError, match=r"--samples: inputs have 5 features, the network has 4"):
        import_weights(module.state_dict(), samples=Samples(torch.zeros(1, 1, 5), logits))
    with pytest.raises(ImportRefusedError, match=r"--samples: outputs are \[3, 2\], the network's are \[3, 3\]"):
        import_weights(module.state_dict(), samples=Samples(x, logits[:, :2]))


def test_standardization_is_that_given() -> None:
    module = tagger(nn.GRU)
    mean, std = np.arange(4, dtype=np.float32), np.full(4, 2, np.float32)
    model = import_weights(module.state_dict(), mean=mean, std=std)
    x = torch.randn(2, 5, 4)
    with torch.no_grad():
        expected = module((x - torch.from_numpy(mean)) / 2)
        torch.testing.assert_close(model(x), expected)


def altered(**changes: Tensor | None) -> dict[str, Tensor]:
    weights: dict[str, Any] = dict(tagger().state_dict())
    weights |= {name.replace("__", "."): tensor for name, tensor in changes.items()}
    return {name: tensor for name, tensor in weights.items() if tensor is not None}


@pytest.mark.parametrize(
    ("weights", "options", "message"),
    [
        (altered(), {}, "--nonlinearity: required for an Elman network"),
        (altered(), {"cell": "lstm"}, "--cell lstm: weight_hh_l0 is 6 x 6, which is RNN's shape"),
        (altered(), {"renamed": {"top": "fc"}}, r"--map: no tensor is named top\.\*; there are encoder.weight_ih_l0"),
        (altered(encoder__weight_hh_l0=torch.zeros(12, 6)), {}, "weight_hh_l0: 12 x 6 fits no RNN"),
        (altered(encoder__weight_ih_l0=torch.zeros(6)), {}, "weight_ih_l0: a matrix is expected"),
        (altered(encoder__weight_ih_l0=None), {}, "weight_ih_l0: a matrix is expected"),
        (altered(encoder__weight_ih_l2=torch.zeros(6, 6)), {"nonlinearity": "tanh"}, "weight_ih_l1: missing"),
        (altered(encoder__weight_hh_l0=torch.full((6, 6), np.nan)), {}, "encoder.weight_hh_l0: holds values that are"),
        (altered(head__weight=None), {"nonlinearity": "tanh"}, r"no readout: one matrix \[outputs, 6\] is expected"),
        (altered(more__weight=torch.zeros(2, 6)), {"nonlinearity": "tanh"}, "head.weight, more.weight; --map NAME=fc"),
        (altered(norm__weight=torch.zeros(6)), {"nonlinearity": "tanh"}, "linear readout: norm.weight"),
        (altered(head__bias=torch.zeros(2)), {"nonlinearity": "tanh"}, r"fc.bias: \[2\], \[3\] expected"),
        (altered(other__weight_ih_l0=torch.zeros(6, 4)), {}, r"2 recurrent modules \(encoder, other\)"),
        (dict(tagger(bidirectional=True).encoder.state_dict()), {}, "bidirectional: import_bidirectional takes it"),
        (dict(tagger(nn.LSTM, proj_size=3).encoder.state_dict()), {}, r"weight_hr_l0: an LSTM with projections"),
        ({"a": torch.zeros(3)}, {}, "no recurrent layer: NAME.weight_ih_l0 is expected, there are a"),
        (altered(), {"nonlinearity": "tanh", "std": np.zeros(4)}, "--std: positive values expected"),
        (altered(), {"nonlinearity": "tanh", "mean": np.zeros(5)}, r"mean: \[5\], \[4\] expected"),
    ],
)
def test_other_networks_are_refused_in_words(weights: dict[str, Tensor], options: Any, message: str) -> None:
    with pytest.raises(ImportRefusedError, match=message):
        import_weights(weights, **options)


def test_a_readout_is_chosen_by_name() -> None:
    weights = altered(more__weight=torch.zeros(2, 6))
    with pytest.raises(ImportRefusedError, match=r"linear readout: more\.weight"):
        import_weights(weights, nonlinearity="tanh", renamed={"head": "fc"})
    del weights["more.weight"]
    model = import_weights(weights, nonlinearity="tanh", renamed={"head": "fc"})
    assert torch.equal(model.fc.weight, weights["head.weight"])


def test_files_of_weights_are_read_whatever_saved_them(tmp_path: Path) -> None:
    state = dict(tagger().state_dict())
    save_file(state, tmp_path / "a.safetensors")
    torch.save(state, tmp_path / "b.pt")
    torch.save({"epoch": 3, "model_state_dict": state}, tmp_path / "c.ckpt")
    for path in tmp_path.iterdir():
        assert read_weights(path).keys() == state.keys()


def test_files_of_anything_else_are_refused(tmp_path: Path) -> None:
    torch.save(tagger(), tmp_path / "module.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"a": 1}, tmp_path / "number.pt")
    (tmp_path / "text.pt").write_text("weights")
    (tmp_path / "text.safetensors").write_text("weights")
    messages = {
        "module.pt": "holds code, not only tensors: save its state_dict",
        "list.pt": "holds a list, not tensors by name",
        "number.pt": "holds no tensors by name",
        "text.pt": "",
        "text.safetensors": "not readable as weights",
    }
    for name, message in messages.items():
        with pytest.raises(ImportRefusedError, match=f"{name}: .*{message}"):
            read_weights(tmp_path / name)


def test_samples_of_other_shapes_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.zeros(3))
    with pytest.raises(ImportRefusedError, match="arrays `inputs` and `outputs` expected, it has x"):
        read_samples(tmp_path / "a.npz")
    np.savez(tmp_path / "b.npz", inputs=np.zeros((2, 3)), outputs=np.zeros((2, 3)))
    with pytest.raises(ImportRefusedError, match=r"expected, got \[2, 3\] and \[2, 3\]"):
        read_samples(tmp_path / "b.npz")


def test_labels_fit_the_outputs() -> None:
    model = SimpleRNN(2, 3, 1)
    assert imported_run(model, "net.pt", "0" * 64).class_labels == ("0", "1")
    assert imported_run(model, "net.pt", "0" * 64, ["no", "yes"]).class_labels == ("no", "yes")
    for labels in (["a"], ["a", "a"], ["a", "b", "c"]):
        with pytest.raises(ImportRefusedError, match=r"--labels: .* 2 are needed for 1 outputs"):
            imported_run(model, "net.pt", "0" * 64, labels)


def test_the_command_imports_with_proof(tmp_path: Path) -> None:
    module = tagger(num_layers=2)
    save_file(dict(module.state_dict()), tmp_path / "net.safetensors")
    x = torch.randn(3, 8, 4)
    with torch.no_grad():
        np.savez(tmp_path / "samples.npz", inputs=x.numpy(), outputs=module(x).numpy())
    (tmp_path / "labels.txt").write_text("low\nmiddle\nhigh\n")
    arguments = ("unroll-export", "import", tmp_path / "net.safetensors", "--out", tmp_path / "models" / "net")
    refused = run(*arguments, check=False)
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert refused.stderr.startswith("unroll-export: --nonlinearity: required for an Elman network")
    done = run(*arguments, "--samples", tmp_path / "samples.npz", "--labels", tmp_path / "labels.txt")
    assert done.stdout.startswith(f"{tmp_path}/models/net/1: written, with proof\n")
    manifest, _ = verify_bundle(tmp_path / "models" / "net" / "1")
    assert list(manifest.class_labels) == ["low", "middle", "high"]
    assert manifest.training.data == "net.safetensors"
