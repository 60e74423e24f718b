"""Imported graphs: those that could run for ever, read other files or draw random numbers are refused."""

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from support.step_graphs import changed, elman

from unroll_engine.kernel import UnsupportedNetworkError
from unroll_engine.runtimes.step_graph import MAX_NODES, check_step_graph

GOOD = elman()
TEXT = TensorProto(name="t", data_type=TensorProto.STRING, dims=[1], string_data=[b"a"])


def add(*nodes: onnx.NodeProto) -> Callable[[onnx.ModelProto], object]:
    return lambda model: model.graph.node.extend(nodes)


def inside_if(*nodes: onnx.NodeProto) -> onnx.NodeProto:
    branch = helper.make_graph(nodes, "branch", [], [helper.make_tensor_value_info(nodes[-1].output[0], 1, None)])
    return helper.make_node("If", ["x"], ["z"], name="choice", then_branch=branch, else_branch=branch)


def nested(depth: int) -> onnx.NodeProto:
    node = helper.make_node("Identity", ["x"], ["deep"])
    for _ in range(depth):
        node = inside_if(node)
    return node


def external(model: onnx.ModelProto) -> None:
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../../etc/passwd")


def short(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].dims[0] = 2**40


def with_function(model: onnx.ModelProto) -> None:
    model.functions.add(name="f", domain="here", output=["y"])


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (add(helper.make_node("Loop", ["", "x"], ["z"], name="forever")), "Loop 'forever': a loop can run for ever"),
        (add(helper.make_node("Scan", ["x"], ["z"])), "Scan 'z': a graph that is repeated"),
        (add(inside_if(helper.make_node("Loop", ["", "x"], ["z"], name="inner"))), "Loop 'inner': a loop"),
        (add(helper.make_node("RandomNormalLike", ["x"], ["z"])), "RandomNormalLike 'z': random numbers"),
        (add(helper.make_node("Dropout", ["x", "", "x"], ["z"])), "Dropout 'z': random numbers"),
        (add(helper.make_node("Gelu", ["x"], ["z"], domain="com.microsoft")), "Gelu 'z': of 'com.microsoft'"),
        (add(helper.make_node("StringNormalizer", ["x"], ["z"])), "StringNormalizer 'z': not an operator"),
        (
            add(helper.make_node("Constant", [], ["z"], value=TEXT)),
            "more than nodes, weights, inputs and outputs",
        ),
        (add(nested(20)), "more than 16 graphs inside each other"),
        (add(*[helper.make_node("Identity", ["x"], [f"z{i}"]) for i in range(MAX_NODES)]), "more than 20000 nodes"),
        (external, "more than nodes, weights, inputs and outputs"),
        (with_function, "more than nodes, weights, inputs and outputs"),
        (short, "tensor 'W': data of shape"),
        (lambda model: model.opset_import.add(domain="ai.onnx.ml", version=3), "operator sets"),
        (lambda model: model.opset_import[0].ClearField("version"), "operator set 0, 7 to 24 expected"),
    ],
)
def test_what_cannot_be_trusted_is_named(change: Callable[[onnx.ModelProto], object], problem: str) -> None:
    content = changed(GOOD, change)
    with pytest.raises(UnsupportedNetworkError, match=problem):
        check_step_graph(content)


def test_a_graph_of_ordinary_operators_passes() -> None:
    assert [node.op_type for node in check_step_graph(GOOD).node][:2] == ["MatMul", "MatMul"]
    check_step_graph(changed(GOOD, add(inside_if(helper.make_node("Relu", ["x"], ["r"])))))
    empty = numpy_helper.from_array(np.zeros((0, 3)), "empty")
    check_step_graph(changed(GOOD, lambda model: model.graph.initializer.append(empty)))


def test_bytes_that_are_no_model_are_refused() -> None:
    with pytest.raises(UnsupportedNetworkError, match="not an ONNX model"):
        check_step_graph(b"\xff" * 40)
