"""Graphs: what the exporter makes passes, and nothing else does, whatever its checksums say."""

import contextlib
from collections.abc import Callable

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from support.models import random_network, served

from unroll_engine.models.spec import ModelSpec
from unroll_engine.runtimes.onnx_graph import check_rnn, check_scan
from unroll_export.graphs.onnx_rnn import build_onnx_rnn
from unroll_export.graphs.onnx_scan import build_onnx_scan
from unroll_proto.bundle import BundleError

NETWORK = random_network(features=3, hidden=5, outputs=4, layers=2)
SPEC = served(NETWORK).spec
FORMS = {"scan": (build_onnx_scan(NETWORK), check_scan), "rnn": (build_onnx_rnn(NETWORK), check_rnn)}


@settings(max_examples=25, deadline=None)
@given(features=st.integers(1, 9), hidden=st.integers(1, 9), outputs=st.integers(1, 5), layers=st.integers(1, 5))
def test_what_the_exporter_makes_passes_and_no_other_sizes_do(
    features: int, hidden: int, outputs: int, layers: int
) -> None:
    network = random_network(features, hidden, outputs, layers)
    spec = served(network).spec
    check_scan(build_onnx_scan(network), spec)
    check_rnn(build_onnx_rnn(network), spec)
    for other in (
        random_network(features + 1, hidden, outputs, layers),
        random_network(features, hidden + 1, outputs, layers),
        random_network(features, hidden, outputs + 1, layers),
        random_network(features, hidden, outputs, layers + 1),
    ):
        with pytest.raises(BundleError):
            check_scan(build_onnx_scan(other), spec)
        with pytest.raises(BundleError):
            check_rnn(build_onnx_rnn(other), spec)


def refused(content: bytes, check: Callable[[bytes, ModelSpec], None]) -> str:
    with pytest.raises(BundleError) as caught:
        check(content, SPEC)
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 1000
    return text


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


def a_branch(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("If", ["condition"], ["x"], then_branch=model.graph, else_branch=None))


def a_loop(model: onnx.ModelProto) -> None:
    model.graph.node[-1].op_type = "Loop"


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


def one_node_less(model: onnx.ModelProto) -> None:
    del model.graph.node[-1]


def other_wires(model: onnx.ModelProto) -> None:
    model.graph.node[1].input[0] = "input"


def an_attribute_more(model: onnx.ModelProto) -> None:
    model.graph.node[-1].attribute.append(helper.make_attribute("axis", 0))


def a_tensor_more(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(numpy_helper.from_array(np.zeros(2**20, np.float32), "huge"))


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


CHANGES = [
    (outside, "fc.weight: its data is outside the file"),
    (outside_beside_its_data, "fc.weight: its data is outside the file"),
    (a_branch, "is If; allowed are Add"),
    (a_loop, "is Loop; allowed are Add"),
    (another_domain, "operator sets"),
    (a_node_of_another_domain, "node 0 is com.microsoft.Sub"),
    (a_newer_opset, "operator sets"),
    (a_function, "functions of its own"),
    (a_training_graph, "training graphs"),
    (a_sparse_weight, "sparse_initializer"),
    (one_node_more, "one too many"),
    (one_node_less, "ends before node"),
    (other_wires, "node 1 is not Div(centred, std)"),
    (an_attribute_more, "attributes ['axis']"),
    (a_tensor_more, "surplus tensors: ['huge']"),
    (a_tensor_twice, "tensors of the same name"),
    (huge_dims, "fc.bias: shape [4611686018427387904], [4] expected"),
    (negative_dims, "fc.bias: shape [-4]"),
    (another_type, "fc.bias: data type 11"),
    (values_twice, "raw data"),
    (short_values, "fc.bias: 15 bytes of raw data, 16 expected"),
    (no_numbers, "fc.bias: has values that are not finite"),
    (another_input, "takes or gives"),
    (text_goes_in, "takes or gives"),
    (nothing, "operator sets"),
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("change", "says"), CHANGES)
def test_whatever_is_changed_in_a_graph_is_refused(
    form: str, change: Callable[[onnx.ModelProto], None], says: str
) -> None:
    content, check = FORMS[form]
    model = onnx.load_from_string(content)
    change(model)
    assert says in refused(model.SerializeToString(), check)


def scan_of(model: onnx.ModelProto) -> onnx.NodeProto:
    return next(node for node in model.graph.node if node.op_type == "Scan")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda body: body.node.append(helper.make_node("Loop", [], ["x"])), "is Loop; allowed are Add"),
        (lambda body: body.initializer.add(name="x"), "surplus tensors: ['x']"),
        (lambda body: body.node[2].ClearField("op_type"), "node 2 is ; allowed"),
    ],
)
def test_the_body_of_a_scan_is_checked_too(change: Callable[[onnx.GraphProto], None], says: str) -> None:
    model = onnx.load_from_string(FORMS["scan"][0])
    change(next(attribute for attribute in scan_of(model).attribute if attribute.name == "body").g)
    assert says in refused(model.SerializeToString(), check_scan)


def test_a_body_that_is_no_graph_is_refused() -> None:
    model = onnx.load_from_string(FORMS["scan"][0])
    body = next(attribute for attribute in scan_of(model).attribute if attribute.name == "body")
    body.CopyFrom(helper.make_attribute("body", 1))
    assert "body is no graph" in refused(model.SerializeToString(), check_scan)


def test_a_pad_that_would_explode_is_refused() -> None:
    model = onnx.load_from_string(FORMS["scan"][0])
    initializer(model.graph, "pads").raw_data = np.array([0, 0, 0, 0, 0, 2**40], "<i8").tobytes()
    assert "pads: not [0, 0, 0, 0, 0, 1]" in refused(model.SerializeToString(), check_scan)


@settings(max_examples=300, deadline=None)
@given(data=st.data(), form=st.sampled_from(sorted(FORMS)))
def test_bytes_that_are_changed_at_will_pass_or_are_refused(data: st.DataObject, form: str) -> None:
    content, check = FORMS[form]
    changed = bytearray(content)
    for _ in range(data.draw(st.integers(1, 8))):
        changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(len(changed) // 2, len(changed)))
    with contextlib.suppress(BundleError):
        check(bytes(changed[:cut]), SPEC)
