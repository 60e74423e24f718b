"""Reading weights out of ONNX graphs: what the exporter writes is read, and anything else is refused by name."""

import contextlib
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from support.models import random_network
from support.recurrent import CELLS, recurrent_network

from unroll_engine.kernel import UnsupportedNetworkError, read_onnx
from unroll_export.graphs.onnx_rnn import build_onnx_rnn
from unroll_export.graphs.onnx_scan import build_onnx_scan

Change = Callable[[onnx.GraphProto], None]
GATES = {"rnn_tanh": 1, "rnn_relu": 1, "lstm": 4, "gru": 3, "gru_reset_before": 3}


@pytest.mark.parametrize("layers", [1, 3])
def test_what_the_exporter_writes_is_read(layers: int) -> None:
    network = random_network(features=3, hidden=5, outputs=4, layers=layers)
    weights = read_onnx(build_onnx_rnn(network))
    assert weights.cell == "rnn_tanh"
    assert weights.scale is not None
    np.testing.assert_array_equal(weights.scale, [network.mean.numpy(), network.std.numpy()])
    np.testing.assert_array_equal(weights.readout, network.fc.weight.detach().numpy())
    np.testing.assert_array_equal(weights.readout_bias, network.fc.bias.detach().numpy())
    assert len(weights.layers) == layers
    for layer, (input_, recurrent, bias) in enumerate(weights.layers):
        parameters = {
            name: getattr(network.rnn, f"{name}_l{layer}").detach().numpy()
            for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        }
        np.testing.assert_array_equal(input_, parameters["weight_ih"])
        np.testing.assert_array_equal(recurrent, parameters["weight_hh"])
        np.testing.assert_array_equal(bias, parameters["bias_ih"] + parameters["bias_hh"])


@pytest.mark.parametrize("cell", CELLS)
def test_every_cell_is_recognized(cell: str) -> None:
    weights = read_onnx(recurrent_network(cell, 3, 5, 2, 2).to_onnx())
    assert weights.cell == cell
    gates = GATES[cell]
    assert [layer.input.shape for layer in weights.layers] == [(gates * 5, 3), (gates * 5, 5)]


def node(graph: onnx.GraphProto, operator: str) -> onnx.NodeProto:
    return next(each for each in graph.node if each.op_type == operator)


def without(*operators: str) -> Change:
    """Takes nodes out; what read their results reads their first inputs instead."""

    def change(graph: onnx.GraphProto) -> None:
        for operator in operators:
            removed = node(graph, operator)
            for other in graph.node:
                for place, name in enumerate(other.input):
                    if name == removed.output[0]:
                        other.input[place] = removed.input[0]
            graph.node.remove(removed)

    return change


def attribute(operator: str, name: str, value: object) -> Change:
    return lambda graph: node(graph, operator).attribute.append(helper.make_attribute(name, value))


def replaced(name: str, array: NDArray[Any]) -> Change:
    def change(graph: onnx.GraphProto) -> None:
        tensor = next(each for each in graph.initializer if each.name == name)
        tensor.CopyFrom(numpy_helper.from_array(array, name))

    return change


def external(graph: onnx.GraphProto) -> None:
    graph.initializer[0].data_location = TensorProto.EXTERNAL


def swapped_states(graph: onnx.GraphProto) -> None:
    split = node(graph, "Split")
    split.output[0], split.output[1] = split.output[1], split.output[0]


def another_operator(graph: onnx.GraphProto) -> None:
    node(graph, "Transpose").op_type = "Tanh"


def foreign_domain(graph: onnx.GraphProto) -> None:
    node(graph, "LSTM").domain = "com.example"


def without_logits(graph: onnx.GraphProto) -> None:
    del graph.output[0]


def changed(cell: str, change: Change) -> bytes:
    model = onnx.load_from_string(recurrent_network(cell, 3, 5, 2, 2).to_onnx())
    change(model.graph)
    return model.SerializeToString()


@pytest.mark.parametrize("parts", [("Sub",), ("Div",), ("Sub", "Div")])
def test_a_graph_may_leave_out_standardization(parts: tuple[str, ...]) -> None:
    scale = read_onnx(changed("gru", without(*parts))).scale
    assert (scale is None) == (len(parts) == 2)
    if scale is not None:
        assert (scale[0] == 0).all() == (parts == ("Sub",))
        assert (scale[1] == 1).all() == (parts == ("Div",))


@pytest.mark.parametrize(
    ("cell", "change", "message"),
    [
        ("lstm", attribute("LSTM", "clip", 3.0), r"\(LSTM\): attributes \['clip'\] are not supported"),
        ("lstm", attribute("LSTM", "direction", "reverse"), "direction or layout"),
        ("gru", attribute("GRU", "activations", ["HardSigmoid", "Tanh"]), "activations .'HardSigmoid', 'Tanh'. are"),
        ("rnn_tanh", attribute("RNN", "layout", 1), "direction or layout"),
        ("lstm", another_operator, r"\(Tanh\): no such operator in the kernel"),
        ("lstm", foreign_domain, r"\(LSTM\): no such operator in the kernel"),
        ("gru", swapped_states, "layer 0: its initial state is not its part of the state inputs"),
        ("gru", external, "float32 or int64 inside the file expected"),
        ("gru", without_logits, "outputs: logits of every step"),
        ("gru", replaced("w1", np.zeros((1, 15, 6), np.float32)), r"weights of shapes .* expected"),
        ("gru", replaced("w1", np.zeros((1, 15, 5))), "tensor 'w1': float32 or int64"),
        ("gru", replaced("fc.weight", np.zeros((6, 2), np.float32)), r"got \[6, 2\]"),
        ("gru", replaced("fc.bias", np.zeros(3, np.float32)), r"only one bias, \[output_size\]"),
        ("gru", replaced("ones", np.array([1, 2])), "only a state can be split, by layers"),
        ("gru", without("Squeeze", "GRU"), r"."),
    ],
)
def test_what_the_kernel_cannot_express_is_refused_with_the_reason(cell: str, change: Change, message: str) -> None:
    with pytest.raises(UnsupportedNetworkError, match=message) as raised:
        read_onnx(changed(cell, change))
    assert "\n" not in str(raised.value)


def test_a_scan_is_refused() -> None:
    content = build_onnx_scan(random_network(features=3, hidden=5, outputs=4, layers=1))
    with pytest.raises(UnsupportedNetworkError, match=r"\(Pad\): no such operator"):
        read_onnx(content)


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_damaged_files_are_read_or_refused_and_nothing_else(data: st.DataObject) -> None:
    content = bytearray(recurrent_network("gru", 2, 3, 2).to_onnx())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(UnsupportedNetworkError):
        weights = read_onnx(bytes(content))
        # A byte may also turn the network into another one: a linear_before_reset of 0 is the other GRU.
        assert weights.cell in CELLS
        (layer,) = weights.layers
        gates = GATES[weights.cell]
        hidden = layer.recurrent.shape[1]
        assert layer.input.shape[0] == layer.recurrent.shape[0] == gates * hidden
        assert layer.bias.shape == ((gates + (weights.cell == "gru")) * hidden,)
        assert weights.readout.shape == (*weights.readout_bias.shape, hidden)
        assert weights.scale is None or {array.shape for array in weights.scale} == {layer.input.shape[1:]}
