"""Arithmetic and gradients of the page, against torch, on bundles of random networks."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.models import random_classifier, random_network
from support.values import random_values
from torch import Tensor

from unroll_client import ModelInfo
from unroll_client._types import Limits
from unroll_export.model import Cell, Nonlinearity, RecurrentClassifier
from unroll_proto.bundle import fingerprint, read_manifest
from unroll_web.page.arithmetic import analysis, unit_arithmetic
from unroll_web.page.network import Layer, Network
from unroll_web.page.weights import WeightsUnavailableError, network_of

CELLS: list[tuple[Cell, Nonlinearity]] = [("rnn", "tanh"), ("rnn", "relu"), ("lstm", "tanh"), ("gru", "tanh")]
STEPS = 9


def info_of(bundle: Path) -> ModelInfo:
    manifest = read_manifest(bundle)
    return ModelInfo(
        name=manifest.name,
        version=manifest.version,
        architecture=manifest.architecture,
        input_size=manifest.input_size,
        hidden_size=manifest.hidden_size,
        output_size=manifest.output_size,
        num_layers=manifest.num_layers,
        class_labels=tuple(manifest.class_labels),
        feature_names=tuple(manifest.feature_names),
        runtime="kernel",
        runtime_note="",
        runtime_variant="",
        device="cpu",
        artifact="model.onnx",
        max_abs_diff=0.0,
        bitwise=True,
        limits=Limits(1, 1, 1, 1),
        test_accuracy=None,
    )


def numpy_of(network: RecurrentClassifier[Any], cell: str) -> Network:
    """Makes the page's network of a torch network."""
    tensors = {name: tensor.numpy() for name, tensor in network.state_dict().items()}
    layers = [
        Layer(*(tensors[f"rnn.{name}_l{index}"] for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")))
        for index in range(network.rnn.num_layers)
    ]
    return Network(cell, tensors["mean"], tensors["std"], layers, tensors["fc.weight"], tensors["fc.bias"])


def unrolled(
    network: RecurrentClassifier[Any], values: np.ndarray[Any, Any]
) -> tuple[Tensor, list[list[Tensor]], list[list[Tensor]]]:
    """Runs each layer's cell step by step in float64; returns the logits, and h and c [layer][step], with gradients."""
    rnn = network.rnn
    kinds = {"RNN": torch.nn.RNNCell, "LSTM": torch.nn.LSTMCell, "GRU": torch.nn.GRUCell}
    x = list(((torch.from_numpy(values).double() - network.mean.double()) / network.std.double()).unbind())
    hs, cs = [], []
    for layer in range(rnn.num_layers):
        options = {"nonlinearity": rnn.nonlinearity} if rnn.mode.startswith("RNN") else {}
        cell = kinds[rnn.mode.split("_")[0]](len(x[0]), rnn.hidden_size, **options).double()
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
            getattr(cell, name).data = getattr(rnn, f"{name}_l{layer}").detach().double()
        h = c = torch.zeros(1, rnn.hidden_size, dtype=torch.float64)
        outputs, cells = [], []
        for row in x:
            if rnn.mode == "LSTM":
                h, c = cell(row[None] if row.ndim == 1 else row, (h, c))
                c.retain_grad()
                cells.append(c)
            else:
                h = cell(row[None] if row.ndim == 1 else row, h)
            h.retain_grad()
            outputs.append(h)
        hs.append(outputs)
        cs.append(cells)
        x = outputs
    logits = torch.nn.functional.linear(x[-1], network.fc.weight.double(), network.fc.bias.double())[0]
    return logits, hs, cs


@pytest.mark.parametrize("outputs", [4, 1])
@pytest.mark.parametrize(("cell", "nonlinearity"), CELLS)
def test_gradients_are_autograds(cell: Cell, nonlinearity: Nonlinearity, outputs: int) -> None:
    network = random_classifier(cell, outputs=outputs, layers=2, nonlinearity=nonlinearity)
    values = random_values(STEPS, features=3)
    header, arrays = analysis(numpy_of(network, nonlinearity if cell == "rnn" else cell), values, 1, 1.0)
    logits, hs, cs = unrolled(network, values)
    wide = torch.cat([torch.zeros(1), logits]) if outputs == 1 else logits
    (-torch.log_softmax(wide, 0)[1]).backward()  # type: ignore[no-untyped-call]
    expected = [[float(h.grad.norm()) if h.grad is not None else 0.0 for h in layer] for layer in hs]
    np.testing.assert_allclose(arrays["gradient"], expected, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(arrays["states"], torch.cat(hs[-1]).detach().numpy(), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(arrays["logits"][-1], logits.detach().numpy(), rtol=1e-9)
    assert ("cells" in arrays) == (cell == "lstm")
    if cell == "lstm":
        of_cells = [[float(c.grad.norm()) if c.grad is not None else 0.0 for c in layer] for layer in cs]
        np.testing.assert_allclose(arrays["cells"], of_cells, rtol=1e-9, atol=1e-12)
    size = network.rnn.hidden_size
    weights = network.rnn.state_dict()["weight_hh_l0"]
    rows = weights[-2 * size : -size] if cell == "lstm" else weights[-size:]
    assert header["radius"][0] == pytest.approx(float(torch.linalg.eigvals(rows).abs().max()), rel=1e-5)


@pytest.mark.parametrize(("cell", "nonlinearity"), CELLS)
def test_the_sum_behind_a_unit_is_its_value(cell: Cell, nonlinearity: Nonlinearity) -> None:
    network = random_classifier(cell, layers=2, nonlinearity=nonlinearity)
    values = random_values(STEPS, features=3)
    _, hs, cs = unrolled(network, values)
    h = [np.concatenate([each.detach().numpy() for each in layer]).astype(np.float32) for layer in hs]
    c = [np.concatenate([each.detach().numpy() for each in layer]).astype(np.float32) for layer in cs if layer]
    for layer in range(2):
        x = values[5] if layer == 0 else h[0][5]
        before = c[layer][4] if c else np.zeros_like(h[layer][4])
        found = unit_arithmetic(
            numpy_of(network, nonlinearity if cell == "rnn" else cell), layer, 2, x, h[layer][4], before
        )
        assert found["value"] == pytest.approx(float(h[layer][5][2]), abs=1e-6)
        term = found["terms"][-1]
        if cell != "gru":  # whose last gate scales a part of its sum
            total = sum(term["x"]) + sum(term["h"]) + term["bx"] + term["bh"]
            squashed = 1 / (1 + np.exp(-total)) if cell == "lstm" else np.tanh(total)
            assert term["value"] == pytest.approx(max(total, 0) if nonlinearity == "relu" else squashed)
        assert len(found["units"]) == len(found["terms"]) == {"rnn": 1, "lstm": 4, "gru": 3}[cell]


def test_a_larger_recurrent_matrix_carries_the_gradient_further() -> None:
    network = numpy_of(random_classifier("rnn"), "tanh")
    values = random_values(STEPS, features=3)
    first, radius = {}, {}
    for factor in (0.5, 1.5):
        header, arrays = analysis(network, values, 0, factor)
        first[factor] = arrays["gradient"][0, 0] / arrays["gradient"][0, -1]
        radius[factor] = header["radius"][0]
    assert first[1.5] > first[0.5]
    assert radius[1.5] == pytest.approx(3 * radius[0.5])


def test_weights_are_read_from_the_bundle_that_is_served(exported: list[Path]) -> None:
    read = network_of(exported[0].parents[1], info_of(exported[0]), fingerprint(read_manifest(exported[0])))
    network = random_network(seed=0)
    values = random_values(STEPS, features=3)
    assert read.cell == "tanh"
    logits, _, _ = unrolled(network, values)
    np.testing.assert_allclose(read.logits(read.forward(values)[-1].h[-1:])[0], logits.detach().numpy(), rtol=1e-9)


def test_weights_of_another_bundle_are_refused(exported: list[Path]) -> None:
    info, root = info_of(exported[0]), exported[0].parents[1]
    other = fingerprint(read_manifest(exported[1]))
    with pytest.raises(WeightsUnavailableError, match="is another bundle"):
        network_of(root, info, other)
    with pytest.raises(WeightsUnavailableError, match="unroll web --models DIR"):
        network_of(None, info, other)
    with pytest.raises(WeightsUnavailableError, match="no such file"):
        network_of(root / "nowhere", info, other)


@pytest.mark.parametrize(("layer", "unit", "problem"), [(1, 0, "layer: 1, the model has 0 to 0"), (0, 8, "unit: 8")])
def test_a_unit_that_is_not_there(layer: int, unit: int, problem: str) -> None:
    network = numpy_of(random_classifier("rnn"), "tanh")
    zeros = np.zeros(8, np.float32)
    with pytest.raises(ValueError, match=problem):
        unit_arithmetic(network, layer, unit, zeros[:3], zeros, zeros)


@pytest.mark.parametrize(
    ("steps", "target", "problem"), [(0, 0, "1 to 4096 steps"), (4097, 0, "got 4097"), (3, 4, "target: 4")]
)
def test_a_gradient_that_can_not_be_had(steps: int, target: int, problem: str) -> None:
    network = numpy_of(random_classifier("rnn"), "tanh")
    with pytest.raises(ValueError, match=problem):
        analysis(network, np.zeros((steps, 3), np.float32), target, 1.0)
