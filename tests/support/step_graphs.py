"""ONNX graphs of one timestep for tests, built by hand, with their states among inputs and outputs."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper

from unroll_export.steps.importing import import_step
from unroll_export.steps.plan import Options
from unroll_export.steps.reading import Source, source_of

Shape = Sequence[Any]
F32 = TensorProto.FLOAT
I64 = TensorProto.INT64


def graph(
    nodes: Sequence[NodeProto],
    inputs: Mapping[str, Shape],
    outputs: Mapping[str, Shape | None],
    tensors: Mapping[str, NDArray[Any]],
    dtypes: Mapping[str, int] | None = None,
    opset: int = 17,
) -> bytes:
    """Makes a model of nodes; tensors that `dtypes` does not name are float32."""
    types = dtypes or {}
    takes, gives = (
        [helper.make_tensor_value_info(name, types.get(name, F32), shape) for name, shape in values.items()]
        for values in (inputs, outputs)
    )
    made = helper.make_graph(nodes, "step", takes, gives, [numpy_helper.from_array(v, k) for k, v in tensors.items()])
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    return bytes(model.SerializeToString())


def elman(
    features: int = 3,
    hidden: int = 8,
    outputs: int = 4,
    state: tuple[str, str] = ("h", "h_next"),
    batch: str | int = "batch",
    last: Sequence[str] = (),
) -> bytes:
    """x, h -> y, h_next: h_next = tanh(x W + h U + b), y = h_next V, and then the operators `last`."""
    rng = np.random.default_rng(5)
    shapes = {"W": (features, hidden), "U": (hidden, hidden), "b": (hidden,), "V": (hidden, outputs)}
    weights = {name: (rng.standard_normal(shape) * 0.4).astype(np.float32) for name, shape in shapes.items()}
    before, after = state
    nodes = [
        helper.make_node("MatMul", ["x", "W"], ["xw"]),
        helper.make_node("MatMul", [before, "U"], ["hu"]),
        helper.make_node("Add", ["xw", "hu"], ["sum"]),
        helper.make_node("Add", ["sum", "b"], ["biased"]),
        helper.make_node("Tanh", ["biased"], [after]),
        helper.make_node("MatMul", [after, "V"], ["y" if not last else "v0"]),
    ]
    for index, operator in enumerate(last):
        to = "y" if index == len(last) - 1 else f"v{index + 1}"
        nodes.append(helper.make_node(operator, [f"v{index}"], [to]))
    return graph(
        nodes,
        {"x": [batch, features], before: [batch, hidden]},
        {"y": [batch, outputs], after: [batch, hidden]},
        weights,
    )


def counter() -> bytes:
    """x, count -> y, count_next: a state of whole numbers, and y = x + count."""
    nodes = [
        helper.make_node("Add", ["count", "one"], ["count_next"]),
        helper.make_node("Cast", ["count"], ["number"], to=F32),
        helper.make_node("Add", ["x", "number"], ["y"]),
    ]
    return graph(
        nodes,
        {"x": ["batch", 1], "count": ["batch", 1]},
        {"y": ["batch", 1], "count_next": ["batch", 1]},
        {"one": np.array([1], np.int64)},
        {"count": I64, "count_next": I64},
    )


def source(content: bytes, file: str = "m.onnx") -> Source:
    """Reads the content of a file as a source."""
    return source_of(file, content)


def import_graph(content: bytes, root: Path, name: str = "step", options: Options | None = None, **more: Any) -> Path:
    """Imports a graph as the next version of a model; returns the version's folder."""
    return import_step(source(content), options or Options(), root / name, **more).path


def import_examples(root: Path) -> None:
    """Imports `elman`, `classes`, which ends with a softmax over four labels, and `counter`."""
    import_graph(elman(), root, "elman")
    import_graph(elman(last=["Softmax"]), root, "classes", labels=["a", "b", "c", "d"])
    import_graph(counter(), root, "counter")


def changed(content: bytes, change: Callable[[onnx.ModelProto], object]) -> bytes:
    """Returns a changed copy of a model."""
    model = onnx.load_from_string(content)
    change(model)
    return bytes(model.SerializeToString())
