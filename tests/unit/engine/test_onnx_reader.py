"""Reading weights from ONNX graphs: the exporter's graphs are read, others are refused with the node's name."""

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
    """Removes nodes; readers of their results read their first inputs instead."""

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
        ("lstm", foreign_domain, r"\(com.example.LSTM\): no such operator in the kernel"),
        ("gru", swapped_states, "layer 0: its initial state is not its part of the state inputs"),
        ("gru", external, "it holds more than nodes"),
        ("gru", without_logits, "outputs: logits and states of every step"),
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


def initializer(graph: onnx.GraphProto, name: str) -> onnx.TensorProto:
    return next(tensor for tensor in graph.initializer if tensor.name == name)


def outside(model: onnx.ModelProto) -> None:
    tensor = initializer(model.graph, "fc.weight")
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    entry = tensor.external_data.add()
    entry.key, entry.value = "location", "../../../etc/passwd"


def outside_beside_its_data(model: onnx.ModelProto) -> None:
    entry = initializer(model.graph, "fc.weight").external_data.add()
    entry.key, entry.value = "location", "/etc/passwd"


def another_domain(model: onnx.ModelProto) -> None:
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))


def a_node_of_another_domain(model: onnx.ModelProto) -> None:
    model.graph.node[0].domain = "com.microsoft"


def a_newer_opset(model: onnx.ModelProto) -> None:
    model.opset_import[0].version = 21


def a_function(model: onnx.ModelProto) -> None:
    function = onnx.FunctionProto(name="Tanh", domain="", output=["y"], input=["x"])
    model.functions.append(function)


def a_training_graph(model: onnx.ModelProto) -> None:
    model.training_info.add()


def a_sparse_weight(model: onnx.ModelProto) -> None:
    model.graph.sparse_initializer.add()


def one_node_more(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("Add", ["logits", "logits"], ["more"]))


def an_attribute_more(model: onnx.ModelProto) -> None:
    model.graph.node[-1].attribute.append(helper.make_attribute("axis", 0))


def a_tensor_twice(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(initializer(model.graph, "mean"))


def huge_dims(model: onnx.ModelProto) -> None:
    initializer(model.graph, "fc.bias").dims[:] = [2**62]


def negative_dims(model: onnx.ModelProto) -> None:
    initializer(model.graph, "fc.bias").dims[:] = [-4]


def another_type(model: onnx.ModelProto) -> None:
    initializer(model.graph, "fc.bias").data_type = TensorProto.DOUBLE


def values_twice(model: onnx.ModelProto) -> None:
    initializer(model.graph, "fc.bias").float_data.append(1.0)


def short_values(model: onnx.ModelProto) -> None:
    tensor = initializer(model.graph, "fc.bias")
    tensor.raw_data = tensor.raw_data[:-1]


def no_numbers(model: onnx.ModelProto) -> None:
    initializer(model.graph, "fc.bias").raw_data = np.full(4, np.nan, "<f4").tobytes()


def another_input(model: onnx.ModelProto) -> None:
    model.graph.input.append(model.graph.input[0])


def text_goes_in(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.STRING


def nothing(model: onnx.ModelProto) -> None:
    model.Clear()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (outside, "it holds more than nodes"),
        (outside_beside_its_data, "it holds more than nodes"),
        (another_domain, "operator sets .*com.microsoft"),
        (a_node_of_another_domain, r"\(com.microsoft.Sub\): no such operator"),
        (a_newer_opset, "operator sets .*21"),
        (a_function, "it holds more than nodes"),
        (a_training_graph, "it holds more than nodes"),
        (a_sparse_weight, "it holds more than nodes"),
        (one_node_more, r"\(Add\): input 'logits' is not"),
        (an_attribute_more, r"\(Add\): attributes {} expected, got {.axis.: 0}"),
        (a_tensor_twice, "tensor 'mean': there are two"),
        (huge_dims, r"raw data of shape \[4611686018427387904\] expected"),
        (negative_dims, r"raw data of shape \[-4\] expected"),
        (another_type, "tensor 'fc.bias': float32"),
        (values_twice, "it holds more than nodes"),
        (short_values, "raw data of shape"),
        (no_numbers, "tensor 'fc.bias': has values that are not finite"),
        (another_input, "two inputs have one name"),
        (text_goes_in, "'input': float32 tensor expected"),
        (nothing, "operator sets"),
    ],
)
def test_a_file_that_nobody_vouches_for_can_vary_weights_only(
    change: Callable[[onnx.ModelProto], None], message: str
) -> None:
    model = onnx.load_from_string(build_onnx_rnn(random_network(features=3, hidden=5, outputs=4, layers=2)))
    change(model)
    with pytest.raises(UnsupportedNetworkError, match=message) as raised:
        read_onnx(model.SerializeToString())
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 500


@settings(max_examples=100)
@given(data=st.data())
def test_damaged_files_are_read_or_refused_and_nothing_else(data: st.DataObject) -> None:
    content = bytearray(recurrent_network("gru", 2, 3, 2).to_onnx())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(UnsupportedNetworkError):
        weights = read_onnx(bytes(content))
        # A changed byte may also make another valid network: linear_before_reset 0 is the other GRU.
        assert weights.cell in CELLS
        (layer,) = weights.layers
        gates = GATES[weights.cell]
        hidden = layer.recurrent.shape[1]
        assert layer.input.shape[0] == layer.recurrent.shape[0] == gates * hidden
        assert layer.bias.shape == ((gates + (weights.cell == "gru")) * hidden,)
        assert weights.readout.shape == (*weights.readout_bias.shape, hidden)
        assert weights.scale is None or {array.shape for array in weights.scale} == {layer.input.shape[1:]}
