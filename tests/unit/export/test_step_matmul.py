"""The form of products computes what the file does, to rounding, with the same bits in any batch."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import NodeProto, helper
from support.step_graphs import elman, graph, import_graph

from unroll_engine import Engine
from unroll_export.steps.plan import Options
from unroll_export.weight_files import ImportRefusedError
from unroll_proto.bundle import verify_bundle

LENGTH = 24
UNITS = 5


@dataclass(frozen=True)
class Layer:
    """A convolution over time, and what follows it."""

    channels: int
    width: int
    stride: int
    pads: tuple[int, int]
    bias: bool
    after: str


LAYERS = st.builds(
    Layer,
    channels=st.integers(1, 7),
    width=st.integers(1, 4),
    stride=st.integers(1, 2),
    pads=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    bias=st.booleans(),
    after=st.sampled_from(["", "Relu", "Tanh", "Square", "Channels", "If"]),
)


def convolving(layers: list[Layer], recurrent: str, channels: int) -> bytes:
    """X [batch, channels, 24] -> convolutions -> the last step -> a recurrent node -> y."""
    rng = np.random.default_rng(len(layers))
    tensors: dict[str, NDArray[Any]] = {
        "one": np.array([1], np.int64),
        "zero": np.array([0], np.int64),
        "much": np.array([99], np.int64),
        "two": np.array(2, np.float32),
        "size": np.array(LENGTH, np.int64),
        "axes": np.array([0, 1], np.int64),
    }
    nodes: list[NodeProto] = []

    def weights(name: str, *shape: int) -> str:
        tensors[name] = (rng.standard_normal(shape) * 0.4).astype(np.float32)
        return name

    def add(operator: str, *inputs: str, to: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(operator, inputs, [to], **attributes))
        return to

    value, count = "x", channels
    for index, layer in enumerate(layers):
        inputs = [value, weights(f"w{index}", layer.channels, count, layer.width)]
        if layer.bias:
            inputs.append(weights(f"b{index}", layer.channels))
        attributes = {"strides": [layer.stride], "pads": list(layer.pads)}
        value, count = add("Conv", *inputs, to=f"c{index}", **attributes), layer.channels
        after = f"a{index}"
        if layer.after in ("Relu", "Tanh"):
            value = add(layer.after, value, to=after)
        elif layer.after == "Square":
            value = add("Pow", value, "two", to=after)
        elif layer.after == "Channels" and count > 1:
            first = add("Slice", value, "zero", "one", "one", to=f"f{index}")
            value = add("Mul", add("Slice", value, "zero", "much", "one", to=f"g{index}"), first, to=after)
        elif layer.after == "If":
            # The condition is a size, as where an exporter squeezes a dimension only if it is 1.
            branches = [
                helper.make_graph(
                    [helper.make_node(operator, [value], ["branch"])],
                    "branch",
                    [],
                    [helper.make_tensor_value_info("branch", onnx.TensorProto.FLOAT, None)],
                )
                for operator in ("Sigmoid", "Relu")
            ]
            shape = add("Gather", add("Shape", "x", to=f"s{index}"), "last", to=f"l{index}")
            tensors["last"] = np.array(2, np.int64)
            chosen = add("Equal", shape, "size", to=f"e{index}")
            value = add("If", chosen, to=after, then_branch=branches[0], else_branch=branches[1])
    # Not a mean: onnxruntime's has other bits in other batches, whatever the form.
    tensors["end"] = np.array(-1, np.int64)
    value = add("Gather", value, "end", to="last_step", axis=2)
    if recurrent:
        gates = {"RNN": 1, "GRU": 3, "LSTM": 4}[recurrent]
        add("Unsqueeze", "last_step", "zero", to="steps")
        inputs = ["steps", weights("W", 1, gates * UNITS, count), weights("R", 1, gates * UNITS, UNITS), "", "", "h"]
        outputs = ["all", "h_next"]
        if recurrent == "LSTM":
            inputs.append("c")
            outputs.append("c_next")
        nodes.append(helper.make_node(recurrent, inputs, outputs, hidden_size=UNITS))
        add("Squeeze", "all", "axes", to="y")
        states = ["h", "c"] if recurrent == "LSTM" else ["h"]
        shape_of: list[int | str] = [1, "batch", UNITS]
    else:
        add("Add", "last_step", "h", to="h_next")
        add("Tanh", "h_next", to="y")
        states, shape_of = ["h"], ["batch", count]
    takes: dict[str, Any] = {"x": ["batch", channels, LENGTH], **dict.fromkeys(states, shape_of)}
    gives: dict[str, Any] = {
        "y": ["batch", UNITS if recurrent else count],
        **{f"{name}_next": shape_of for name in states},
    }
    return graph(nodes, takes, gives, tensors)


@settings(max_examples=30, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(
    layers=st.lists(LAYERS, min_size=1, max_size=4),
    recurrent=st.sampled_from(["", "RNN", "GRU", "LSTM"]),
    channels=st.integers(1, 3),
)
def test_products_give_what_the_file_gives_with_the_same_bits_in_any_batch(
    layers: list[Layer], recurrent: str, channels: int
) -> None:
    content = convolving(layers, recurrent, channels)
    values = np.random.default_rng(1).standard_normal((9, channels * LENGTH), np.float32)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        import_graph(content, root, "published", Options(alone=True))
        path = import_graph(content, root, "matmul", Options(matmul=True))
        manifest, proofs = verify_bundle(path)
        assert (manifest.step.form, manifest.step.bitwise) == ("matmul", True)
        assert [case.name for case in proofs.proofs[0].cases][-1] == "the file, step by step"
        graph_of = onnx.load(path / "model.onnx").graph
        assert not {"Conv", "If", "RNN", "GRU", "LSTM"}.intersection(node.op_type for node in graph_of.node)
        with Engine.load(root / "published") as published, Engine.load(path) as products:
            expected = published.open().advance(values).logits
            np.testing.assert_allclose(products.open().advance(values).logits, expected, rtol=1e-4, atol=1e-5)


def test_a_branch_that_depends_on_the_values_is_refused(tmp_path: Path) -> None:
    branches = [
        helper.make_graph(
            [helper.make_node(operator, ["c"], ["branch"])],
            "branch",
            [],
            [helper.make_tensor_value_info("branch", onnx.TensorProto.FLOAT, None)],
        )
        for operator in ("Relu", "Identity")
    ]
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"]),
        helper.make_node("ReduceSum", ["x"], ["sum"], keepdims=0),
        helper.make_node("Greater", ["sum", "limit"], ["loud"]),
        helper.make_node("If", ["loud"], ["y"], name="gate", then_branch=branches[0], else_branch=branches[1]),
        helper.make_node("Add", ["h", "y"], ["h_next"]),
    ]
    shape = ["batch", 1, 4]
    # Between the sums of the two runs that are compared, of 3 and of 5 sequences.
    sums = [np.random.default_rng(seed).standard_normal((lanes, 1, 4)).sum() for seed, lanes in ((0, 3), (1, 5))]
    tensors = {"w": np.ones((1, 1, 1), np.float32), "limit": np.array(np.mean(sums), np.float32)}
    content = graph(nodes, {"x": shape, "h": shape}, {"y": shape, "h_next": shape}, tensors)
    with pytest.raises(ImportRefusedError, match="--form matmul: If 'gate' depends on the values"):
        import_graph(content, tmp_path, "m", Options(matmul=True))


def test_without_convolutions_there_is_no_such_form(tmp_path: Path) -> None:
    with pytest.raises(ImportRefusedError, match="no convolution over time and no recurrent node"):
        import_graph(elman(), tmp_path, "m", Options(matmul=True))
